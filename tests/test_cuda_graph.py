"""The ops of an expert layer and of decoding in a CUDA graph: captured once, replayed with other tokens, routing and lengths; no waiting for the device."""
import pytest
import torch

import mixtral_ext
from op_calls import check_results, poisoned

pytestmark = pytest.mark.gpu
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 256, 384
ROUTINGS = ("balanced", "two", "skewed", "balanced")


class Layer:
    """Static buffers of a router and its experts; `fill` changes the tokens and where they go."""

    def __init__(self, tokens, dtype=torch.bfloat16):
        self.generator = torch.Generator("cuda").manual_seed(tokens)
        self.weights = dict(w_gate_up=self.normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN, dtype=dtype) * HIDDEN**-0.5,
                            w_down=self.normal(EXPERTS, HIDDEN, INTERMEDIATE, dtype=dtype) * 2 * INTERMEDIATE**-0.5)
        self.hidden, self.logits = self.normal(tokens, HIDDEN, dtype=dtype), self.normal(tokens, EXPERTS)
        rows = tokens * TOP_K

        def ints(*shape):
            return torch.empty(shape, dtype=torch.int32, device="cuda")

        self.gate = (torch.empty(tokens, TOP_K, device="cuda"), ints(tokens, TOP_K), ints(EXPERTS + 1), ints(rows), ints(tokens, TOP_K))
        self.out = torch.empty_like(self.hidden)

    def normal(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="cuda").normal_(generator=self.generator)

    def fill(self, routing):
        tokens = len(self.logits)
        self.hidden.normal_(generator=self.generator)
        self.logits.normal_(generator=self.generator)
        if routing == "balanced":
            slots = torch.arange(tokens * TOP_K, device="cuda").view(tokens, TOP_K)
            self.logits.scatter_add_(1, slots % EXPERTS, torch.full(slots.shape, 20.0, device="cuda"))
        elif routing == "two":
            self.logits[:, [1, 6]] += 20
        else:  # most tokens on expert 3, the others anywhere
            self.logits[tokens // 8:, 3] += 20
        for t in (*self.gate, self.out):
            t.copy_(poisoned(t))

    def call(self):
        mixtral_ext.moe_gate(self.logits, TOP_K, out=self.gate)
        weights, ids, *maps = self.gate
        mixtral_ext.moe_experts(self.hidden, **self.weights, topk_weights=weights, topk_ids=ids, expert_offsets=maps[0],
                                sorted_slots=maps[1], slot_rows=maps[2], out=self.out)

    def results(self):
        return [t.clone() for t in (*self.gate, self.out)]

    def check(self):
        """Against float64, each op on its own inputs."""
        check_results("moe_gate", dict(router_logits=self.logits, top_k=TOP_K), self.gate, "out")
        weights, ids, *_ = self.gate
        check_results("moe_experts", dict(hidden=self.hidden, **self.weights, topk_weights=weights, topk_ids=ids), (self.out,), "out")


@pytest.fixture(params=[1, 16, 333])
def layer(request):
    layer = Layer(request.param)
    layer.fill("balanced")
    layer.call()  # warm-up
    torch.cuda.synchronize()
    return layer


def test_replays_with_other_routing(layer):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.call()
    for routing in ROUTINGS:
        layer.fill(routing)
        graph.replay()
        replayed = layer.results()
        layer.check()
        for t in (*layer.gate, layer.out):
            t.copy_(poisoned(t))
        layer.call()
        for a, b in zip(replayed, layer.results()):
            assert torch.equal(a, b), routing


def test_routing_given_as_ids_in_a_graph(layer):
    """moe_experts that sorts by itself."""
    weights, ids, *_ = layer.gate
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mixtral_ext.moe_experts(layer.hidden, **layer.weights, topk_weights=weights, topk_ids=ids, out=layer.out)
    for routing in ROUTINGS:
        layer.fill(routing)
        layer.call()
        expected = layer.out.clone()
        layer.out.copy_(poisoned(layer.out))
        graph.replay()
        assert torch.equal(layer.out, expected), routing


def functional_calls(layer):
    """As mixtral_model calls the ops: routing and experts, and a dense MLP as one expert with every row."""
    routing = mixtral_ext.moe_gate(layer.logits, TOP_K)
    out = mixtral_ext.moe_experts(layer.hidden, *layer.weights.values(), *routing)
    inner = mixtral_ext.grouped_gemm_swiglu(layer.hidden, layer.weights["w_gate_up"][:1], layer.all_rows)
    return *routing, out, inner, mixtral_ext.grouped_gemm(inner, layer.weights["w_down"][:1], layer.all_rows)


@torch.inference_mode()
def test_functional_forms(layer):
    """Their results and workspaces live in the graph's own memory."""
    layer.all_rows = torch.tensor([0, len(layer.hidden)], dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        functional_calls(layer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = functional_calls(layer)
    for routing in ROUTINGS:
        layer.fill(routing)
        for t in replayed:
            t.copy_(poisoned(t))
        graph.replay()
        for a, b in zip(replayed, functional_calls(layer)):
            assert torch.equal(a, b), routing
        *gate, out, inner, dense = replayed
        check_results("moe_gate", dict(router_logits=layer.logits, top_k=TOP_K), gate, "functional")
        check_results("moe_experts", dict(hidden=layer.hidden, **layer.weights, topk_weights=gate[0], topk_ids=gate[1]), (out,), "functional")
        for op, a, name, result in (("grouped_gemm_swiglu", layer.hidden, "w_gate_up", inner), ("grouped_gemm", inner, "w_down", dense)):
            weights = {"b" if op == "grouped_gemm" else name: layer.weights[name][:1]}
            check_results(op, dict(a=a, **weights, expert_offsets=layer.all_rows), (result,), "functional")


def test_nothing_waits_for_the_device(layer):
    layer.fill("skewed")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    layer.check()


def test_same_bits_in_every_run(layer):
    for routing in ROUTINGS[:3]:
        layer.fill(routing)
        layer.call()
        first = layer.results()
        for _ in range(2):
            for t in (*layer.gate, layer.out):
                t.copy_(poisoned(t))
            layer.call()
            for a, b in zip(first, layer.results()):
                assert torch.equal(a, b), routing


# --------------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("window, capacity", ((600, 600), (None, 1500)))
@pytest.mark.parametrize("chunk", (1, 3, 40))
def test_decoding_in_a_graph(chunk, window, capacity):
    """One captured step over the ring, replayed while the sequences grow: every step is what the op gives outside of a graph, and right."""
    generator = torch.Generator("cuda").manual_seed(chunk)
    sequences, heads, key_heads, head_dim = 3, 8, 2, 128

    def normal(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)

    q, k, v = (normal(sequences * chunk, n, head_dim) for n in (heads, key_heads, key_heads))
    caches = dict(k_cache=normal(sequences, capacity, key_heads, head_dim), v_cache=normal(sequences, capacity, key_heads, head_dim))
    lengths = torch.tensor([0, 570, 1200], dtype=torch.int32, device="cuda")
    rest = dict(cu_seqlens_q=torch.arange(0, sequences * chunk + 1, chunk, dtype=torch.int32, device="cuda"), cache_lengths=lengths, window=window,
                max_seqlen_q=chunk, max_cache_length=capacity - chunk if window is None else None, rope_theta=1e4)
    out = torch.empty_like(q), torch.empty(heads, len(q), device="cuda")

    def step():
        mixtral_ext.rolling_attention(q, k, v, **caches, **rest, out=out)
        lengths.add_(chunk)

    start = lengths.clone(), *(x.clone() for x in caches.values())
    step()  # warm-up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for x, saved in zip((lengths, *caches.values()), start):
        x.copy_(saved)
    for _ in range(4):
        for x in (q, k, v):
            x.normal_(generator=generator)
        inputs = dict(q=q, k=k, v=v, **{name: x.clone() for name, x in caches.items()}, **{**rest, "cache_lengths": lengths.clone()})
        for x in out:
            x.copy_(poisoned(x))
        graph.replay()
        check_results("rolling_attention", inputs, (*out, *caches.values()), "out")
        again = mixtral_ext.rolling_attention(**inputs)
        assert all(torch.equal(a, b) for a, b in zip((*again, inputs["k_cache"], inputs["v_cache"]), (*out, *caches.values())))
