"""What people use today for routing and experts of Mixtral: PEERS[op] lists the peers of each op (see peer.Peer)."""

import functools

import torch
from torch.nn.functional import grouped_mm, silu

from mixtral_bench import llama_cpp
from mixtral_bench.peer import Peer, Unsupported, heads_first, memory, need

CHECKED = 16  # rows of a yardstick compared with f32


# ------------------------------------------------------------------------------------------------------------ routing


def sorted_slots(ids, experts):
    """Of ids [T, K] and arange(E + 1): expert_offsets, sorted_slots, slot_rows."""
    by_expert, order = ids.flatten().sort(stable=True)
    offsets = torch.searchsorted(by_expert, experts, out_int32=True)  # unlike bincount, this never waits for the device
    slot_rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return offsets, order.int(), slot_rows.view_as(ids).int()


def torch_gate(case, inputs):
    logits, top_k, renormalize = inputs["router_logits"], inputs["top_k"], inputs["renormalize"]
    experts = torch.arange(logits.shape[1] + 1, device=logits.device)

    def call():
        wide = logits.float()
        chosen, ids = wide.topk(top_k, dim=1)
        weights = chosen.softmax(1) if renormalize else wide.softmax(1).gather(1, ids)
        return weights, ids.int(), *sorted_slots(ids, experts)

    return call


def torch_sort(case, inputs):
    ids = inputs["topk_ids"]
    experts = torch.arange(inputs["num_experts"] + 1, dtype=ids.dtype, device=ids.device)
    return lambda: sorted_slots(ids, experts)


def vllm_gate(case, inputs):
    """Its routing: top-k, and slots sorted by expert in blocks padded to the rows of a tile."""
    from vllm._custom_ops import topk_softmax
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    logits, top_k, renormalize = inputs["router_logits"], inputs["top_k"], inputs["renormalize"]
    tokens, experts = logits.shape
    weights = logits.new_empty(tokens, top_k, dtype=torch.float32)
    ids, source = (logits.new_empty(tokens, top_k, dtype=torch.int32) for _ in range(2))
    block = 16 if tokens <= experts else 64  # its default tile

    def call():
        topk_softmax(weights, ids, source, logits, renormalize)
        moe_align_block_size(ids, block, experts)  # its maps are laid out for its own tiles
        return weights, ids

    return call


def torch_permute(case, inputs):
    hidden, slots, top_k = inputs["hidden"], inputs["sorted_slots"], inputs["top_k"]
    return lambda: hidden.index_select(0, slots // top_k)


def torch_combine(case, inputs):
    rows, slot_rows, weights = inputs["rows"], inputs["slot_rows"], inputs["topk_weights"]

    def call():
        gathered = rows.index_select(0, slot_rows.flatten()).view(*slot_rows.shape, -1)
        return torch.bmm(weights[:, None].to(rows.dtype), gathered)[:, 0]

    return call


# ----------------------------------------------------------------------------------------------------- grouped products


def gathered_rows(inputs):
    """a, or the rows of it that the product takes."""
    a, rows = inputs["a"], inputs.get("a_rows")
    return a if rows is None else a.index_select(0, rows // inputs["a_rows_divisor"])


def torch_grouped_gemm(case, inputs):
    b, ends = inputs["b"].transpose(1, 2), inputs["expert_offsets"][1:]
    return lambda: grouped_mm(gathered_rows(inputs), b, offs=ends)


def torch_grouped_gemm_swiglu(case, inputs):
    b, ends = inputs["w_gate_up"].transpose(1, 2), inputs["expert_offsets"][1:]

    def call():
        gate, up = grouped_mm(gathered_rows(inputs), b, offs=ends).chunk(2, -1)
        return silu(gate) * up

    return call


def dense(*products):
    """A yardstick: one dense product a[M, Kd] @ w[N, Kd].T for each (a, w) -> their results."""

    def call():
        return tuple(torch.mm(a, w.T) for a, w in products)

    def error(results):
        errors = []
        for result, (a, w) in zip(results, products):
            at = torch.linspace(0, len(a) - 1, min(len(a), CHECKED), device=a.device).round().long()
            exact = a[at].float() @ w.float().T
            errors.append((result[at].float() - exact).norm() / exact.norm())
        return float(torch.stack(errors).max())

    return call, error


def dense_gemm(case, inputs):
    return dense((gathered_rows(inputs), inputs["b" if "b" in inputs else "w_gate_up"][0]))


def dense_experts(case, inputs):
    hidden, w_down = inputs["hidden"], inputs["w_down"]
    rows = hidden.index_select(0, inputs["sorted_slots"] // inputs["topk_ids"].shape[1])
    inner = torch.empty(len(rows), w_down.shape[2], dtype=hidden.dtype, device=hidden.device)
    inner.normal_(generator=torch.Generator(hidden.device).manual_seed(0))
    return dense((rows, inputs["w_gate_up"][0]), (inner, w_down[0]))


# ------------------------------------------------------------------------------------------------------------ experts


def layer(inputs):
    """hidden [T, H], w_gate_up [E, 2I, H], w_down [E, H, I], topk_weights f32 [T, K], topk_ids i32 [T, K]."""
    return (inputs[name] for name in ("hidden", "w_gate_up", "w_down", "topk_weights", "topk_ids"))


def torch_experts(case, inputs):
    """The layer as one composes it of torch's ops: sort, gather, grouped_mm, SwiGLU, grouped_mm, weighted sum."""
    x, w_gate_up, w_down, weights, ids = layer(inputs)
    experts = torch.arange(len(w_gate_up), dtype=ids.dtype, device=x.device)

    def call():
        by_expert, order = ids.flatten().sort(stable=True)
        ends = torch.searchsorted(by_expert, experts, right=True, out_int32=True)
        token = order // ids.shape[1]
        gate, up = grouped_mm(x[token], w_gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        rows = grouped_mm(silu(gate) * up, w_down.transpose(1, 2), offs=ends)
        return torch.zeros_like(x).index_add_(0, token, rows * weights.flatten()[order, None].to(x.dtype))

    return call


def transformers_experts(w_gate_up, w_down, implementation: str):
    """transformers' block over these weights, which are not copied."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    experts, hidden, intermediate = w_down.shape
    config = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts,
                           experts_implementation=implementation)
    with torch.device("meta"):
        block = MixtralExperts(config)
    block.gate_up_proj = torch.nn.Parameter(w_gate_up, requires_grad=False)
    block.down_proj = torch.nn.Parameter(w_down, requires_grad=False)
    return block


def transformers_block(implementation, case, inputs):
    x, w_gate_up, w_down, weights, ids = layer(inputs)
    if implementation == "batched_mm":
        expert = (w_gate_up[0].numel() + w_down[0].numel()) * x.element_size()
        need(ids.numel() * expert, 0.8 * memory(x.device)[0], "copies of weights")
    block, ids = transformers_experts(w_gate_up, w_down, implementation), ids.long()  # its router gives i64
    return lambda: block(x, ids, weights)


LIGER_TUNED = set()  # sizes


def liger_experts(case, inputs):
    """Its tuner keeps for all T what was fastest in the first call: here one of 4096 tokens, as in the training that it is made for."""
    from liger_kernel.ops import LigerFusedMoEFunction

    x, w_gate_up, w_down, weights, ids = layer(inputs)
    if w_down.shape not in LIGER_TUNED:
        tokens = torch.arange(4096, device=x.device) % len(x)
        LigerFusedMoEFunction.apply(x[tokens], w_gate_up, w_down, ids[tokens], weights[tokens])
        LIGER_TUNED.add(w_down.shape)
    return lambda: LigerFusedMoEFunction.apply(x, w_gate_up, w_down, ids, weights)


@functools.cache
def vllm_config():
    from vllm.config import VllmConfig

    return VllmConfig()


def vllm_experts(case, inputs):
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import fused_experts

    x, w_gate_up, w_down, weights, ids = layer(inputs)

    def call():
        with set_current_vllm_config(vllm_config()):
            return fused_experts(x, w_gate_up, w_down, weights, ids)

    return call


@functools.cache
def sglang_settings():
    """Its kernels ask the server's settings."""
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy"))


def sglang_experts(case, inputs):
    from sglang.srt.layers.moe.fused_moe_triton import fused_experts
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    sglang_settings()
    x, w_gate_up, w_down, weights, ids = layer(inputs)
    config = MoeRunnerConfig(num_experts=len(w_down), num_local_experts=len(w_down), top_k=ids.shape[1], inplace=False)
    routing = StandardTopKOutput(weights, ids, None)  # the logits are not read
    return lambda: fused_experts(x, w_gate_up, w_down, routing, config)


# --------------------------------------------------------------------------------------------------------------- rope


def cos_sin(inputs):
    """[1, T, D] each, in the dtype of q, as transformers' models make once a step for all their layers."""
    q, positions, theta = inputs["q"], inputs["positions"], inputs["theta"]
    if inputs["interleaved"] or inputs["k"] is None:
        raise Unsupported("half-split heads only, q and k together")
    half = q.shape[2] // 2
    frequency = theta ** (-torch.arange(half, device=q.device, dtype=torch.float32) / half)
    angle = (positions.float()[:, None] * frequency).repeat(1, 2)[None]
    return angle.cos().to(q.dtype), angle.sin().to(q.dtype)


def transformers_rope(case, inputs):
    from transformers.models.mixtral.modeling_mixtral import apply_rotary_pos_emb

    q, k, (cos, sin) = heads_first(inputs["q"]), heads_first(inputs["k"]), cos_sin(inputs)
    return lambda: tuple(t[0].transpose(0, 1) for t in apply_rotary_pos_emb(q, k, cos, sin))


def liger_rope(case, inputs):
    """In place as ours: only the first call turns what the case gave."""
    from liger_kernel.ops import LigerRopeFunction

    q, k, (cos, sin) = heads_first(inputs["q"].clone()), heads_first(inputs["k"].clone()), cos_sin(inputs)
    return lambda: tuple(t[0].transpose(0, 1) for t in LigerRopeFunction.apply(q, k, cos, sin))


# ---------------------------------------------------------------------------------------------------------- the lists

TRANSFORMERS = dict(package="transformers", module="transformers")
LIGER = dict(devices=("cuda",), package="liger-kernel", module="liger_kernel")
VLLM = dict(devices=("cuda",), package="vllm", module="vllm")
SGLANG = dict(devices=("cuda",), package="sglang", module="sglang")
LLAMA_CPP = dict(devices=("cpu",), package="llama-cpp-python", module="llama_cpp")

PEERS: dict[str, list[Peer]] = {
    "moe_gate": [
        Peer("torch", torch_gate),
        Peer("vLLM", vllm_gate, **VLLM),
    ],
    "moe_sort": [Peer("torch sort", torch_sort)],
    "moe_permute": [Peer("torch index_select", torch_permute)],
    "moe_combine": [Peer("torch gather + bmm", torch_combine)],
    "grouped_gemm": [
        Peer("torch grouped_mm", torch_grouped_gemm),
        Peer("torch.mm, same FLOPs", dense_gemm, yardstick=True),
    ],
    "grouped_gemm_swiglu": [
        Peer("torch grouped_mm", torch_grouped_gemm_swiglu),
        Peer("torch.mm, same FLOPs", dense_gemm, yardstick=True),
    ],
    "moe_experts": [
        Peer("torch grouped_mm", torch_experts),
        *(Peer(f"transformers {name}", functools.partial(transformers_block, name), **TRANSFORMERS)
          for name in ("eager", "batched_mm", "grouped_mm")),
        Peer("Liger", liger_experts, **LIGER),
        Peer("vLLM", vllm_experts, **VLLM),
        Peer("SGLang", sglang_experts, **SGLANG),
        Peer("llama.cpp", llama_cpp.experts, **LLAMA_CPP),
        Peer("torch.mm, same FLOPs", dense_experts, yardstick=True),
    ],
    "apply_rope": [
        Peer("transformers", transformers_rope, **TRANSFORMERS),
        Peer("Liger", liger_rope, **LIGER),
    ],
}
