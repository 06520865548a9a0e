"""The bench's peers on tiny shapes of the CPU: those that run here against float64; those that need a GPU with a stand-in for their library
that takes what its documentation says and computes it with torch."""
import contextlib
import dataclasses
import importlib.util
import math
import subprocess
import sys
import types

import pytest
import torch

from mixtral_bench import attention_peers, moe_peers, peer
from mixtral_bench.cases import (ApplyRopeCase, GroupedGemmCase, GroupedGemmSwigluCase, MoeCombineCase, MoeExpertsCase, MoeGateCase,
                                 MoePermuteCase, MoeSortCase, RollingAttentionCase, SlidingWindowAttentionCase)
from mixtral_ext import reference

PEERS = moe_peers.PEERS | attention_peers.PEERS
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

CASES = {
    "moe_gate": [MoeGateCase("plain", tokens=37), MoeGateCase("all experts", tokens=5, renormalize=False),
                 MoeGateCase("k3", tokens=9, top_k=3)],
    "moe_sort": [MoeSortCase("plain", tokens=37), MoeSortCase("k1", tokens=5, top_k=1, ids_dtype=torch.int64)],
    "moe_permute": [MoePermuteCase("plain"), MoePermuteCase("k1", top_k=1)],
    "moe_combine": [MoeCombineCase("plain"), MoeCombineCase("k3", top_k=3)],
    "grouped_gemm": [GroupedGemmCase("plain"), GroupedGemmCase("gather", segments=(3, 0, 5, 2), gather=2)],
    "grouped_gemm_swiglu": [GroupedGemmSwigluCase("plain"), GroupedGemmSwigluCase("gather", segments=(3, 0, 5, 2), gather=2)],
    "moe_experts": [MoeExpertsCase("one token", tokens=1), MoeExpertsCase("plain", tokens=9), MoeExpertsCase("k1", tokens=5, top_k=1),
                    MoeExpertsCase("k3", tokens=5, top_k=3), MoeExpertsCase("few", tokens=40, routing="few")],
    "apply_rope": [ApplyRopeCase("plain", heads=4, first=77), ApplyRopeCase("interleaved", interleaved=True)],
}
PROMPT = SlidingWindowAttentionCase("window", sequences=((40, 40),), heads=4, key_heads=2, window=9, layout="single")
PACKED = dataclasses.replace(PROMPT, name="packed", sequences=((17, 17), (1, 1), (30, 30)), layout="packed")
PROMPTS = [
    PROMPT,
    dataclasses.replace(PROMPT, name="causal", window=None),
    dataclasses.replace(PROMPT, name="wide window", window=40),
    dataclasses.replace(PROMPT, name="scale", softmax_scale=0.3),
    dataclasses.replace(PROMPT, name="window 1", window=1),
    dataclasses.replace(PROMPT, name="more keys", sequences=((5, 40),)),
    PACKED,
    dataclasses.replace(PACKED, name="packed causal", window=None),
    dataclasses.replace(PACKED, name="packed, more keys", sequences=((3, 20), (17, 17), (1, 9))),
]
STEP = RollingAttentionCase("wrapped ring", chunks=(1, 1), lengths=(50, 50), capacity=16, window=16, heads=4, key_heads=2)
STEPS = [
    STEP,
    dataclasses.replace(STEP, name="rope", rope_theta=1e4),
    dataclasses.replace(STEP, name="rope interleaved", rope_theta=1e6, rope_interleaved=True),
    dataclasses.replace(STEP, name="causal", window=None, lengths=(15, 15), rope_theta=1e4),
    dataclasses.replace(STEP, name="window below capacity", window=5),
    dataclasses.replace(STEP, name="not full", lengths=(3, 3)),
    dataclasses.replace(STEP, name="first token", lengths=(0, 0)),
    dataclasses.replace(STEP, name="scale", softmax_scale=0.3),
]
CASES |= {"sliding_window_attention": PROMPTS, "rolling_attention": STEPS}
WINDOWS = {c.name for c in PROMPTS} - {"causal", "wide window", "packed causal"}
ONE_SEQUENCE = {"packed", "packed causal", "packed, more keys"}
REFUSED = {  # cases that a peer refuses
    "SDPA": WINDOWS | ONE_SEQUENCE,
    "SDPA, no window": {"causal", "wide window", "more keys"} | ONE_SEQUENCE,
    "transformers sdpa": {"causal", "wide window", "packed causal"},
    "cuDNN frontend": ONE_SEQUENCE | {"more keys"},
}


def find(op: str, name: str):
    return next(p for p in PEERS[op] if p.name == name)


def make(case, dtype=torch.bfloat16) -> dict:
    """The case's inputs, and what the bench adds to them."""
    inputs = case.inputs(dtype)
    if case.op == "moe_experts":
        inputs |= zip(("expert_offsets", "sorted_slots", "slot_rows"), reference.moe_sort(inputs["topk_ids"], case.experts))
    return inputs


def exact(case, inputs):
    """The op in float64."""
    wide = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}
    result = getattr(reference, case.op)(**wide)
    return result[0] if case.op in ("sliding_window_attention", "rolling_attention") else result


def error(result, expected) -> float:
    """The largest relative error of the tensors of numbers; indices are equal."""
    pairs = list(zip(result, expected)) if isinstance(expected, tuple) else [(result, expected)]
    assert all(a.shape == b.shape for a, b in pairs)
    assert all(torch.equal(a, b) for a, b in pairs if not b.is_floating_point())
    if not any(b.is_floating_point() for _, b in pairs):
        return 0.0
    return float(torch.stack([(a.double() - b).norm() / b.norm() for a, b in pairs if b.is_floating_point()]).max())


def uncompiled(monkeypatch):
    """FlexAttention without compiling, which takes a minute."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(attention_peers, "FLEX", attention_peers.Flex(allowance=100))


# ------------------------------------------------------------------------------------------------------------ they run


def test_the_list():
    for op, peers in PEERS.items():
        assert len({p.name for p in peers}) == len(peers) and op in CASES
        assert all(p.devices and (p.module or not p.package) and set(p.changed) <= {"window"} for p in peers)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
@pytest.mark.parametrize("op, name", [(op, p.name) for op, peers in PEERS.items() for p in peers if "cpu" in p.devices and not p.yardstick])
def test_peers_of_the_cpu(monkeypatch, op, name, dtype):
    tested = find(op, name)
    if tested.module and not importlib.util.find_spec(tested.module):
        pytest.skip(f"{tested.package} is not installed")
    uncompiled(monkeypatch)
    rounds = dtype == torch.bfloat16 or (name == "llama.cpp" and "attention" in op)  # its keys and values are f16
    refused = REFUSED.get(name.replace(" flash", ""), set()) | {"interleaved"}
    for case in CASES[op]:
        inputs = make(case, dtype)
        before = {key: x.clone() for key, x in inputs.items() if torch.is_tensor(x)}
        if case.name in refused and op in ("sliding_window_attention", "apply_rope"):
            with pytest.raises(peer.Unsupported):
                tested.prepare(case, inputs)
            continue
        call, expected = tested.prepare(case, inputs), exact(dataclasses.replace(case, **tested.changed), inputs | tested.changed)
        for _ in range(2):
            assert error(call(), expected) < (0.01 if rounds else 1e-5), case.name
        assert all(torch.equal(inputs[key].nan_to_num(7), x.nan_to_num(7)) for key, x in before.items()), case.name


def test_the_gate_of_torch_is_whole():
    """All five results; ids of float logits are unique, so order is no question."""
    case = MoeGateCase("plain", tokens=300)
    inputs = make(case, torch.float32)
    result, expected = find("moe_gate", "torch").prepare(case, inputs)(), reference.moe_gate(**inputs)
    assert len(result) == 5 and all(a.dtype == b.dtype for a, b in zip(result, expected))


@pytest.mark.parametrize("op", ("grouped_gemm", "grouped_gemm_swiglu", "moe_experts"))
def test_yardsticks(op):
    case = CASES[op][1]
    inputs = make(case)
    call, error_of = find(op, "torch.mm, same FLOPs").prepare(case, inputs)
    results = call()
    rows = 18 if op == "moe_experts" else 10
    widths = {"grouped_gemm": [48], "grouped_gemm_swiglu": [96], "moe_experts": [96, 64]}[op]
    assert [list(r.shape) for r in results] == [[rows, width] for width in widths]
    assert 0 < error_of(results) < 0.01
    assert error_of(tuple(r * 1.05 for r in results)) > 0.04
    assert math.isnan(error_of(tuple(r * math.nan for r in results)))


def test_batched_mm_copies_weights(monkeypatch):
    monkeypatch.setattr(moe_peers, "memory", lambda device: (10**6, 10**9))  # 3 * 64 * 48 weights of 2 bytes for each of 80 rows: 1.5 MB
    case = MoeExpertsCase("x", tokens=40)
    with pytest.raises(peer.Unsupported, match="copies of weights: 0.0 GB"):
        find("moe_experts", "transformers batched_mm").prepare(case, make(case))
    smaller = MoeExpertsCase("x", tokens=20)
    assert find("moe_experts", "transformers batched_mm").prepare(smaller, make(smaller))().shape == (20, 64)


def test_a_mask_takes_a_quarter_of_memory_at_most(monkeypatch):
    attention_peers.mask.cache_clear()
    monkeypatch.setattr(attention_peers, "memory", lambda device: (0, 4 * 2 * 40**2))
    assert attention_peers.mask(((40, 40),), 9, torch.bfloat16, CPU).shape == (40, 40)
    with pytest.raises(peer.Unsupported, match="its mask"):
        attention_peers.mask(((41, 41),), 9, torch.bfloat16, CPU)


def test_masks_are_shared_by_copies_of_a_case():
    attention_peers.mask.cache_clear()
    for _ in range(3):
        for name in ("masked SDPA", "transformers sdpa"):
            find("sliding_window_attention", name).prepare(PROMPT, make(PROMPT))
    assert attention_peers.mask.cache_info().misses == 1


@pytest.mark.parametrize("change", (dict(lengths=(50, 49)), dict(chunks=(1, 2)), dict(slots=3, cache_slots=(2, 0)), dict(read_only=True)))
def test_steps_that_are_refused(change):
    case = dataclasses.replace(STEP, **change)
    for tested in PEERS["rolling_attention"]:
        with pytest.raises(peer.Unsupported, match="one new token"):
            tested.prepare(case, make(case))


def test_caches_in_order_are_shared_and_freed(monkeypatch):
    inputs, name = make(STEP), "SDPA flash"
    _, keys, values = attention_peers.step(STEP, inputs, heads_first=True)
    assert attention_peers.step(STEP, inputs, heads_first=True)[1] is keys and keys.shape == (2, 2, 16, 64) and keys.is_contiguous()
    by_token = attention_peers.step(STEP, inputs, heads_first=False)[1]
    assert torch.equal(by_token, keys.transpose(1, 2)) and by_token.is_contiguous()
    assert torch.equal(by_token[:, -1], inputs["k"]) and torch.equal(by_token[:, 0], inputs["k_cache"][:, 35 % 16])
    other = make(STEP)
    monkeypatch.setattr(attention_peers, "memory", lambda device: (10, 10))
    with pytest.raises(peer.Unsupported, match="a copy of the caches"):
        find("rolling_attention", name).prepare(STEP, other)
    held = len(attention_peers.ORDERED)
    del inputs
    assert len(attention_peers.ORDERED) < held


def test_compiling_stops_at_its_limit(monkeypatch):
    uncompiled(monkeypatch)
    monkeypatch.setattr(attention_peers.FLEX, "allowance", -1.0)
    flex = find("sliding_window_attention", "FlexAttention")
    with pytest.raises(peer.Unsupported, match="compiling for the cases before took 0 s, -1 are allowed"):
        flex.prepare(PROMPT, make(PROMPT))
    monkeypatch.setattr(attention_peers.FLEX, "allowance", 0.0)
    flex.prepare(PROMPT, make(PROMPT))
    spent = attention_peers.FLEX.seconds
    flex.prepare(PROMPT, make(PROMPT))  # another copy of the same case
    assert attention_peers.FLEX.seconds == spent > 0
    with pytest.raises(peer.Unsupported):
        flex.prepare(PACKED, make(PACKED))


# ----------------------------------------------------------------------------------------------------- they are absent

LIBRARIES = ("transformers", "liger_kernel", "vllm", "sglang", "cudnn", "flash_attn", "flash_attn_interface", "llama_cpp")


def test_importing_the_peers_needs_torch_alone():
    code = f"import sys; sys.modules.update(dict.fromkeys({LIBRARIES})); import mixtral_bench.moe_peers, mixtral_bench.attention_peers"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("op, name", [(op, p.name) for op, peers in PEERS.items() for p in peers if p.package])
def test_an_absent_library_is_an_import_error(monkeypatch, op, name):
    tested = find(op, name)
    for module in [m for m in sys.modules if m.split(".")[0] == tested.module.split(".")[0]]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, tested.module.split(".")[0], None)
    moe_peers.vllm_config.cache_clear(), moe_peers.sglang_settings.cache_clear(), attention_peers.llama_cpp.library.cache_clear()
    case = CASES[op][0]
    with pytest.raises(ImportError):
        tested.prepare(case, make(case))


# ------------------------------------------------------------------------------------------- stand-ins for their libraries


def module(monkeypatch, name: str, **contents):
    """Makes `name` importable, and the packages above it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        if end > 1:
            monkeypatch.setattr(sys.modules[".".join(parts[:end - 1])], parts[end - 1], sys.modules[path], raising=False)
    for key, value in contents.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


def check(op: str, name: str, dtype=torch.bfloat16, cases=None, calls: int = 2):
    tested = find(op, name)
    assert "cuda" in tested.devices
    for case in cases or CASES[op]:
        inputs = make(case, dtype)
        expected = exact(dataclasses.replace(case, **tested.changed), inputs | tested.changed)
        call = tested.prepare(case, inputs)
        for _ in range(calls):
            assert error(call(), expected) < 0.01, case.name


def experts_f64(x, w_gate_up, w_down, weights, ids):
    """The layer, gate above up, as these libraries document it -> in the dtype of x."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, (row, chosen) in enumerate(zip(weights.double(), ids.tolist())):
        for weight, e in zip(row, chosen):
            gate, up = (w_gate_up[e].double() @ x[t].double()).chunk(2)
            out[t] += weight * (w_down[e].double() @ (torch.nn.functional.silu(gate) * up))
    return out.to(x.dtype)


def test_liger_experts(monkeypatch):
    class LigerFusedMoEFunction:
        @staticmethod
        def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
            assert top_k_index.dtype == torch.int32 and top_k_weights.dtype == torch.float32
            return experts_f64(x, gate_up_proj, down_proj, top_k_weights, top_k_index)

    module(monkeypatch, "liger_kernel.ops", LigerFusedMoEFunction=LigerFusedMoEFunction)
    check("moe_experts", "Liger")


def test_liger_rope(monkeypatch):
    class LigerRopeFunction:
        @staticmethod
        def apply(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
            """[B, H, T, D]; in place where [B, T, H, D] is contiguous."""
            assert cos.shape == sin.shape == (1, q.shape[2], q.shape[3])
            for t in (q, k):
                assert t.transpose(1, 2).is_contiguous()
                a, b = t.clone().chunk(2, -1)
                t.copy_(t * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None])
            return q, k

    module(monkeypatch, "liger_kernel.ops", LigerRopeFunction=LigerRopeFunction)
    check("apply_rope", "Liger", cases=CASES["apply_rope"][:1], calls=1)
    inputs = make(CASES["apply_rope"][0])
    q = inputs["q"].clone()
    find("apply_rope", "Liger").prepare(CASES["apply_rope"][0], inputs)()
    assert torch.equal(inputs["q"], q)


@pytest.fixture
def vllm(monkeypatch):
    moe_peers.vllm_config.cache_clear()
    current = []

    @contextlib.contextmanager
    def set_current_vllm_config(vllm_config, check_compile=False, prefix=None):
        current.append(vllm_config)
        yield
        current.pop()

    def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids, inplace=False, activation="silu", apply_router_weight_on_input=False,
                      global_num_experts=-1, expert_map=None, quant_config=None):
        assert current and not inplace and hidden_states.is_contiguous() and w1.stride(-1) == w2.stride(-1) == 1
        return experts_f64(hidden_states, w1, w2, topk_weights, topk_ids)

    aligned = []

    def topk_softmax(topk_weights, topk_ids, token_expert_indices, gating_output, renormalize=False, e_score_correction_bias=None):
        assert (topk_weights.dtype, topk_ids.dtype, token_expert_indices.dtype) == (torch.float32, torch.int32, torch.int32)
        weights, ids = gating_output.double().softmax(1).topk(topk_ids.shape[1])
        topk_weights.copy_(weights / weights.sum(1, keepdim=True) if renormalize else weights)
        topk_ids.copy_(ids)

    def moe_align_block_size(topk_ids, block_size, num_experts, expert_map=None, pad_sorted_ids=False):
        assert (block_size, num_experts) == (16 if len(topk_ids) <= 8 else 64, 8)
        aligned.append(topk_ids)

    module(monkeypatch, "vllm.config", VllmConfig=lambda: "config", set_current_vllm_config=set_current_vllm_config)
    module(monkeypatch, "vllm._custom_ops", topk_softmax=topk_softmax)
    module(monkeypatch, "vllm.model_executor.layers.fused_moe", fused_experts=fused_experts)
    module(monkeypatch, "vllm.model_executor.layers.fused_moe.moe_align_block_size", moe_align_block_size=moe_align_block_size)
    yield aligned
    moe_peers.vllm_config.cache_clear()


def test_vllm_experts(vllm):
    check("moe_experts", "vLLM")


def test_vllm_gate(vllm):
    for case in CASES["moe_gate"]:
        inputs = make(case)
        weights, ids = find("moe_gate", "vLLM").prepare(case, inputs)()
        assert error((weights, ids), exact(case, inputs)[:2]) < 1e-6 and vllm.pop() is ids  # its maps are part of the call


def test_sglang(monkeypatch):
    moe_peers.sglang_settings.cache_clear()
    settings = []

    @dataclasses.dataclass
    class MoeRunnerConfig:
        num_experts: int | None = None
        num_local_experts: int | None = None
        top_k: int | None = None
        activation: str = "silu"
        is_gated: bool = True
        inplace: bool = True
        no_combine: bool = False

    class StandardTopKOutput(tuple):
        def __new__(cls, topk_weights, topk_ids, router_logits):
            return super().__new__(cls, (topk_weights, topk_ids, router_logits))

    def fused_experts(hidden_states, w1, w2, topk_output, moe_runner_config, b1=None, b2=None, use_fp8_w8a8=False):
        assert settings == ["dummy"] and isinstance(topk_output, StandardTopKOutput)
        assert moe_runner_config == MoeRunnerConfig(len(w1), len(w1), topk_output[1].shape[1], inplace=False)
        return experts_f64(hidden_states, w1, w2, *topk_output[:2])

    module(monkeypatch, "sglang.srt.server_args", ServerArgs=lambda model_path: model_path,
           set_global_server_args_for_scheduler=settings.append)
    module(monkeypatch, "sglang.srt.layers.moe.fused_moe_triton", fused_experts=fused_experts)
    module(monkeypatch, "sglang.srt.layers.moe.moe_runner", MoeRunnerConfig=MoeRunnerConfig)
    module(monkeypatch, "sglang.srt.layers.moe.topk", StandardTopKOutput=StandardTopKOutput)
    check("moe_experts", "SGLang")
    moe_peers.sglang_settings.cache_clear()


def attend(q, k, v, scale, causal, left, right):
    """flash-attn's rule for one sequence: query i of n sees the keys i + m - n - left .. i + m - n + right of m, where -1 is no limit;
    a causal mask sets right to 0."""
    n, m, group = len(q), len(k), q.shape[1] // k.shape[1]
    distance = torch.arange(m)[None] - (torch.arange(n)[:, None] + m - n)
    seen = torch.ones(n, m, dtype=torch.bool)
    if left not in (-1, None):
        seen &= distance >= -left
    if causal or right not in (-1, None):
        seen &= distance <= (0 if causal else right)
    out = torch.empty(q.shape, dtype=torch.float64)
    for head in range(q.shape[1]):
        scores = q[:, head].double() @ k[:, head // group].double().T * (q.shape[2] ** -0.5 if scale is None else scale)
        out[:, head] = scores.masked_fill(~seen, -math.inf).softmax(1) @ v[:, head // group].double()
    return out.to(q.dtype)


def varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, scale, causal, window):
    assert starts_q.dtype == starts_k.dtype == torch.int32 and isinstance(longest_q, int) and isinstance(longest_k, int)
    assert (longest_q, longest_k) == (int(starts_q.diff().max()), int(starts_k.diff().max()))
    at, of = ([slice(a, b) for a, b in zip(s.tolist(), s.tolist()[1:])] for s in (starts_q, starts_k))
    return torch.cat([attend(q[i], k[j], v[j], scale, causal, *window) for i, j in zip(at, of)])


def flash_attn_module(version: int) -> dict:
    no_window = (None, None) if version == 4 else (-1, -1)

    def wrapped(out):
        return (out, None) if version > 2 else out  # as some versions return lse, too

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=no_window):
        return wrapped(torch.stack([attend(*tensors, softmax_scale, causal, *window_size) for tensors in zip(q, k, v)]))

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
                               window_size=no_window):
        return wrapped(varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size))

    def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, softmax_scale=None, causal=False):
        assert k is None and v is None and cache_seqlens.dtype == torch.int32 and k_cache.stride(-1) == 1
        return torch.stack([attend(a, b[:n], c[:n], softmax_scale, causal, -1, -1)
                            for a, b, c, n in zip(q, k_cache, v_cache, cache_seqlens.tolist())])

    functions = dict(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    return functions if version == 4 else functions | dict(flash_attn_with_kvcache=flash_attn_with_kvcache)


@pytest.mark.parametrize("version", (2, 3, 4))
@pytest.mark.parametrize("op", ("sliding_window_attention", "rolling_attention"))
def test_flash_attn(monkeypatch, op, version):
    module(monkeypatch, attention_peers.FLASH_ATTN[version], **flash_attn_module(version))
    check(op, f"flash-attn {version}")


@pytest.mark.parametrize("old", (True, False), ids=("torch 2.11", "torch 2.13"))
def test_varlen_attn(monkeypatch, old):
    """With and without enable_gqa."""
    def old_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, False, window_size)

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa
        return old_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", old_varlen_attn if old else varlen_attn)
    check("sliding_window_attention", "torch varlen_attn")


@pytest.mark.parametrize("name", ("cuDNN", "efficient"))
@pytest.mark.parametrize("op", ("sliding_window_attention", "rolling_attention"))
def test_backends_of_a_gpu(monkeypatch, op, name):
    """Asked for by name, and then SDPA as on the CPU."""
    asked = []

    @contextlib.contextmanager
    def sdpa_kernel(backend):
        asked.append(backend)
        yield

    monkeypatch.setattr(attention_peers, "sdpa_kernel", sdpa_kernel)
    more = ", no window" if op == "sliding_window_attention" else ", heads as rows"
    cases = {"": PROMPTS[1:3], ", no window": PROMPTS[:1]} if op == "sliding_window_attention" else {}
    for suffix in ("", more):
        check(op, f"SDPA {name}{suffix}", cases=cases.get(suffix))
    assert set(asked) == {attention_peers.BACKENDS[name]}


class FakeCudnn(types.SimpleNamespace):
    """The calls that cuDNN's Python frontend 1.12 to 1.32 takes; `execute` computes with torch."""

    class Node:
        def set_output(self, output):
            assert output
            return self

        def set_dim(self, dim):
            self.dim = dim
            return self

        def set_stride(self, stride):
            self.stride = stride
            return self

    def __init__(self):
        super().__init__(data_type=types.SimpleNamespace(BFLOAT16=1, HALF=2, FLOAT=3), heur_mode=types.SimpleNamespace(A=1, FALLBACK=2),
                         diagonal_alignment=types.SimpleNamespace(TOP_LEFT=1), create_handle=lambda: "handle",
                         set_stream=lambda handle, stream: None, pygraph=self.graph)

    def graph(self, handle, io_data_type, intermediate_data_type, compute_data_type):
        assert (handle, io_data_type, intermediate_data_type, compute_data_type) == ("handle", 1, 3, 3)
        done = []

        def sdpa(name, q, k, v, attn_scale, generate_stats, diagonal_alignment, diagonal_band_right_bound, diagonal_band_left_bound=None):
            assert not generate_stats and diagonal_alignment == 1 and diagonal_band_right_bound == 0
            self.asked = (q, k, v), self.Node(), attn_scale, diagonal_band_left_bound
            return self.asked[1], None

        def execute(arguments, workspace, handle):
            nodes, output, scale, window = self.asked
            assert done == ["validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans"]
            for node in (*nodes, output):
                assert (node.dim, node.stride) == (list(arguments[node].shape), list(arguments[node].stride()))
            q, k, v = (arguments[node][0].transpose(0, 1) for node in nodes)
            arguments[output].copy_(attend(q, k, v, scale, True, None if window is None else window - 1, 0).transpose(0, 1)[None])

        def tensor(name, dim, stride, data_type):
            assert data_type == 1
            return self.Node().set_dim(dim).set_stride(stride)

        steps = ("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans")
        return types.SimpleNamespace(tensor=tensor, sdpa=sdpa, execute=execute, get_workspace_size=lambda: 0,
                                     **{name: lambda *_, name=name: done.append(name) for name in steps})


def test_cudnn_frontend(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", FakeCudnn())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=7))
    attention_peers.cudnn_handle.cache_clear()
    refused = REFUSED["cuDNN frontend"]
    check("sliding_window_attention", "cuDNN frontend", cases=[case for case in PROMPTS if case.name not in refused])
    for case in PROMPTS:
        if case.name in refused:
            with pytest.raises(peer.Unsupported):
                find("sliding_window_attention", "cuDNN frontend").prepare(case, make(case))
    with pytest.raises(peer.Unsupported, match="float32"):
        find("sliding_window_attention", "cuDNN frontend").prepare(PROMPT, make(PROMPT, torch.float32))
    attention_peers.cudnn_handle.cache_clear()
