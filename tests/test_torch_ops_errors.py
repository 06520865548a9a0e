"""Bad arguments of the torch ops: an error that names the argument, what was expected and what came, and nothing written."""
import re

import pytest
import torch

import mixtral_ext
from mixtral_ext import debug
from op_calls import MUTATED, OPS, case, float_on, outputs, same_bits, small_cases

HUGE = 2**31 - 1
NAMES = {"moe_gate": "plain", "moe_sort": "plain", "moe_permute": "plain", "moe_combine": "plain", "grouped_gemm": "gather",
         "grouped_gemm_swiglu": "gather", "moe_experts": "maps", "sliding_window_attention": "ragged",
         "rolling_attention": "slots", "apply_rope": "plain"}


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def longs(t):
    return t.long()


def doubles(t):
    return t.double()


def halves(t):
    return t.half()


def turned(t):
    """The same shape with another innermost stride."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def short(t):
    return t[:-1]


def narrow(t):
    return t[..., :-1].contiguous()


def flat(t):
    return t.reshape(-1)


def deep(t):
    return t[None, None, None]


def gapped(t):
    """The same values with a gap after each."""
    return torch.stack([t, t], dim=-1)[..., 0]


def off_by_one(t):
    """The same values one element further on in memory."""
    return torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape)


def rows_apart(count):
    """The same values with a gap of `count` elements after each row."""
    return lambda t: torch.nn.functional.pad(t, (0, count))[..., :t.shape[-1]]


def cut(count):
    """The first `count` columns; rows as far apart as before."""
    return lambda t: t[..., :count]


# op, argument, what to do with it (a function of its value, or the new value), the message after "mixtral_<op>: "
HOST_VISIBLE = [
    ("moe_gate", "router_logits", doubles, "router_logits: expected dtype float32, bfloat16 or float16, got float64$"),
    ("moe_gate", "router_logits", torch.Tensor.bool, "router_logits: expected dtype float32, bfloat16 or float16, got bool$"),
    ("moe_gate", "router_logits", longs, "router_logits: expected dtype float32, bfloat16 or float16, got int64"),
    ("moe_gate", "router_logits", flat, "router_logits: expected 2 dimensions, got 1"),
    ("moe_gate", "router_logits", deep, "router_logits: expected 1 to 4 dimensions, got 5"),
    ("moe_gate", "router_logits", turned, r"router_logits: expected innermost stride 1, got \d+"),
    ("moe_gate", "router_logits", torch.zeros(3, 257), r"router_logits.shape\[1\] \(experts\): expected 1 to 256, got 257"),
    ("moe_gate", "top_k", 0, "top_k: expected 1 to 8, got 0"),
    ("moe_gate", "top_k", 9, "top_k: expected 1 to 8, got 9"),
    ("moe_gate", "top_k", -1, "top_k: expected 1 to 8, got -1"),
    ("moe_gate", "top_k", 2**32 + 2, "top_k: expected a 32-bit integer, got 4294967298"),
    ("moe_sort", "topk_ids", torch.Tensor.float, "topk_ids: expected dtype int32 or int64, got float32"),
    ("moe_sort", "topk_ids", flat, "topk_ids: expected 2 dimensions, got 1"),
    ("moe_sort", "topk_ids", torch.zeros(3, 9, dtype=torch.int32), r"topk_ids.shape\[1\] \(top_k\): expected 1 to 8, got 9"),
    ("moe_sort", "num_experts", 0, "num_experts: expected 1 to 256, got 0"),
    ("moe_sort", "num_experts", 257, "num_experts: expected 1 to 256, got 257"),
    ("moe_permute", "hidden", longs, "hidden: expected dtype float32, bfloat16 or float16, got int64"),
    ("moe_permute", "hidden", turned, "hidden: expected innermost stride 1"),
    ("moe_permute", "sorted_slots", longs, "sorted_slots: expected dtype int32, got int64"),
    ("moe_permute", "sorted_slots", gapped, "sorted_slots: expected innermost stride 1, got 2"),
    ("moe_permute", "top_k", 0, "top_k: expected 1 to 8, got 0"),
    ("moe_combine", "rows", flat, "rows: expected 2 dimensions, got 1"),
    ("moe_combine", "slot_rows", longs, "slot_rows: expected dtype int32, got int64"),
    ("moe_combine", "topk_weights", halves, "topk_weights: expected dtype float32, got float16"),
    ("moe_combine", "topk_weights", short, r"topk_weights: expected shape \[7, 2\], got \[6, 2\]"),
    ("grouped_gemm", "a", halves, "b: expected dtype float16 .as a., got float32"),
    ("grouped_gemm", "b", narrow, r"b: expected shape \[any, any, 64\], got \[4, 48, 63\]"),
    ("grouped_gemm", "b", turned, "b: expected innermost stride 1"),
    ("grouped_gemm", "expert_offsets", short, r"expert_offsets: expected shape \[5\], got \[4\]"),
    ("grouped_gemm", "expert_offsets", longs, "expert_offsets: expected dtype int32, got int64"),
    ("grouped_gemm", "a_rows", longs, "a_rows: expected dtype int32, got int64"),
    ("grouped_gemm", "a_rows_divisor", 0, "a_rows_divisor: expected 1 to 2147483647, got 0"),
    ("grouped_gemm_swiglu", "w_gate_up", lambda t: t[:, 1:].contiguous(), r"w_gate_up.shape\[1\]: expected an even number of rows"),
    ("grouped_gemm_swiglu", "w_gate_up", halves, "w_gate_up: expected dtype float32 .as a., got float16"),
    ("grouped_gemm_swiglu", "a_rows_divisor", -1, "a_rows_divisor: expected 1 to 2147483647, got -1"),
    ("moe_experts", "w_down", narrow, r"w_down: expected shape \[4, 64, 48\], got \[4, 64, 47\]"),
    ("moe_experts", "topk_weights", doubles, "topk_weights: expected dtype float32, got float64$"),
    ("moe_experts", "topk_ids", torch.Tensor.short, "topk_ids: expected dtype int32 or int64, got int16$"),
    ("moe_experts", "topk_ids", short, r"topk_ids: expected shape \[7, any\], got \[6, 2\]"),
    ("moe_experts", "slot_rows", None, "expert_offsets, sorted_slots, slot_rows: expected all or none, got 2 of 3"),
    ("sliding_window_attention", "q", doubles, "q: expected dtype float32, bfloat16 or float16, got float64$"),
    ("sliding_window_attention", "q", flat, r"q: expected 3 dimensions \(packed\) or 4 \(batched\), got 1"),
    ("sliding_window_attention", "q", narrow, "q: expected head dim 64 or 128|k: expected shape"),
    ("sliding_window_attention", "k", halves, "k: expected dtype float32 .as q., got float16"),
    ("sliding_window_attention", "v", short, r"v: expected shape \[34, 2, 64\], got \[33, 2, 64\]"),
    ("sliding_window_attention", "k_start", i32(0), "k_start, k_length: expected none with a packed q, got some"),
    ("sliding_window_attention", "cu_seqlens_k", None, "cu_seqlens_k: expected a tensor, got none"),
    ("sliding_window_attention", "window", 0, "window: expected None or a value other than 0, got 0"),
    ("sliding_window_attention", "window", -1, "window: expected 0 to 2147483647, got -1"),
    ("sliding_window_attention", "softmax_scale", float("nan"), "softmax_scale: expected a finite number, got -?nan"),
    ("sliding_window_attention", "softmax_scale", 0.0, "softmax_scale: expected None or a value other than 0, got 0"),
    ("sliding_window_attention", "max_seqlen_q", -1, "max_seqlen_q: expected 0 to 2147483647, got -1"),
    ("rolling_attention", "k", None, "k, v: expected both or none, got v alone"),
    ("rolling_attention", "v_cache", short, r"v_cache: expected shape \[5, 8, 1, 64\], got \[4, 8, 1, 64\]"),
    ("rolling_attention", "k_cache", lambda t: t[:1].expand(5, -1, -1, -1), "k_cache: expected an output whose elements do not share"),
    ("rolling_attention", "cache_lengths", short, r"cache_lengths: expected shape \[2\], got \[1\]"),
    ("rolling_attention", "cache_slots", longs, "cache_slots: expected dtype int32, got int64"),
    ("rolling_attention", "window", 9, "window: expected 0 to 8, got 9"),
    ("rolling_attention", "window", None, r"max_cache_length: expected max_cache_length \+ max_seqlen_q <= 8 \(capacity\)"),
    ("rolling_attention", "max_cache_length", -1, "max_cache_length: expected None or a value of 0 or more, got -1$"),
    ("rolling_attention", "rope_theta", 0.0, "rope_theta: expected None or a value other than 0, got 0"),
    ("rolling_attention", "rope_theta", -1.0, "rope_theta: expected 0 or a number from 1e-30 to 1e30, got -1"),
    ("rolling_attention", "rope_theta", 1e-50, "rope_theta: expected 0 or a number from 1e-30 to 1e30, got 1e-50"),
    ("rolling_attention", "rope_theta", 1e40, "rope_theta: expected 0 or a number from 1e-30 to 1e30, got 1e\\+40"),
    ("apply_rope", "q", narrow, "q: expected head dim 64 or 128, got 63"),
    ("apply_rope", "k", halves, "k: expected dtype float32 .as q., got float16"),
    ("apply_rope", "positions", torch.Tensor.float, "positions: expected dtype int32 or int64, got float32"),
    ("apply_rope", "positions", short, r"positions: expected shape \[5\], got \[4\]"),
    ("apply_rope", "theta", 0.0, "theta: expected a number from 1e-30 to 1e30, got 0"),
    ("apply_rope", "theta", 1e-50, "theta: expected a number from 1e-30 to 1e30, got 1e-50"),
    ("apply_rope", "theta", float("inf"), "theta: expected a number from 1e-30 to 1e30, got inf"),
]


UNALIGNED = "expected data aligned to 16 bytes, got 0x[0-9a-f]+2$"
STRIDES = "expected strides that are multiples of 16 bytes, got {} elements in dimension {}$"
HALF = "expected dtype bfloat16 or float16, got float32$"
# What CUDA alone refuses: op, the arguments that are changed, the message after "mixtral_<op>: ".
CUDA_HOST_VISIBLE = [
    ("moe_permute", dict(hidden=torch.Tensor.float), f"hidden: {HALF}"),
    ("moe_permute", dict(hidden=rows_apart(3)), "hidden: " + STRIDES.format(67, 0)),
    ("grouped_gemm", dict(a=torch.Tensor.float), f"a: {HALF}"),
    ("grouped_gemm", dict(b=torch.Tensor.float), f"b: {HALF}"),
    ("grouped_gemm", dict(a=off_by_one), f"a: {UNALIGNED}"),
    ("grouped_gemm", dict(b=off_by_one), f"b: {UNALIGNED}"),
    ("grouped_gemm", dict(a=rows_apart(4)), "a: " + STRIDES.format(68, 0)),
    ("grouped_gemm", dict(b=rows_apart(1)), "b: " + STRIDES.format(65, 1)),
    ("grouped_gemm", dict(a=cut(60), b=cut(60)), r"a.shape\[1\]: expected a multiple of 8 on CUDA, got 60$"),
    ("grouped_gemm_swiglu", dict(w_gate_up=torch.Tensor.float), f"w_gate_up: {HALF}"),
    ("grouped_gemm_swiglu", dict(w_gate_up=off_by_one), f"w_gate_up: {UNALIGNED}"),
    ("grouped_gemm_swiglu", dict(a=cut(60), w_gate_up=cut(60)), r"a.shape\[1\]: expected a multiple of 8 on CUDA, got 60$"),
    ("moe_experts", dict(hidden=torch.Tensor.float), f"hidden: {HALF}"),
    ("moe_experts", dict(w_down=torch.Tensor.float), f"w_down: {HALF}"),
    ("moe_experts", dict(hidden=off_by_one), f"hidden: {UNALIGNED}"),
    ("moe_experts", dict(w_gate_up=off_by_one), f"w_gate_up: {UNALIGNED}"),
    ("moe_experts", dict(w_down=rows_apart(4)), "w_down: " + STRIDES.format(52, 1)),
    ("moe_experts", dict(hidden=lambda t: t[None]), "hidden: expected 2 dimensions, got 3$"),
    ("moe_experts", dict(w_gate_up=lambda t: t[:, :92], w_down=cut(46)), r"w_down.shape\[2\]: expected a multiple of 8 on CUDA, got 46$"),
    ("moe_experts", dict(topk_weights=torch.Tensor.bfloat16), "topk_weights: expected dtype float32, got bfloat16$"),
]

# Values inside index arrays.
VALUES = [
    ("moe_permute", "sorted_slots", 3, 14, "sorted_slots: expected -1 to 13, got 14 in row 3"),
    ("moe_permute", "sorted_slots", 3, -2, "sorted_slots: expected -1 to 13, got -2 in row 3"),
    ("moe_permute", "sorted_slots", -1, HUGE, "sorted_slots: expected -1 to 13, got 2147483647 in row 13"),
    ("moe_combine", "slot_rows", (2, 1), 14, "slot_rows: expected -1 to 13, got 14 at [2, 1]"),
    ("moe_combine", "slot_rows", (6, 1), -HUGE - 1, "slot_rows: expected -1 to 13, got -2147483648 at [6, 1]"),
    ("grouped_gemm", "expert_offsets", 0, 1, "expert_offsets: expected 0 at [0], got 1"),
    ("grouped_gemm", "expert_offsets", 2, 2, "expert_offsets: expected 3 to 10 at [2], got 2"),
    ("grouped_gemm", "expert_offsets", 4, 11, "expert_offsets: expected 8 to 10 at [4], got 11"),
    ("grouped_gemm", "a_rows", 9, 10, "a_rows: expected 0 to 9, got 10 in row 9"),
    ("grouped_gemm", "a_rows", 0, -1, "a_rows: expected 0 to 9, got -1 in row 0"),
    ("grouped_gemm_swiglu", "expert_offsets", 4, HUGE, "expert_offsets: expected 8 to 10 at [4], got 2147483647"),
    ("grouped_gemm_swiglu", "a_rows", 4, HUGE, "a_rows: expected 0 to 9, got 2147483647 in row 4"),
    ("moe_experts", "expert_offsets", 4, 15, "expert_offsets: expected"),
    ("moe_experts", "sorted_slots", 0, 14, "sorted_slots: expected 0 to 13, got 14 at element 0"),
    ("moe_experts", "slot_rows", (0, 1), 14, "slot_rows: expected -1 to 13, got 14 at element 1"),
    ("sliding_window_attention", "cu_seqlens_q", 0, 1, "cu_seqlens_q: expected 0 at [0], got 1"),
    ("sliding_window_attention", "cu_seqlens_q", 2, 4, "cu_seqlens_q: expected values that do not decrease, got 4 after 5 at [2]"),
    ("sliding_window_attention", "cu_seqlens_q", 5, HUGE, "cu_seqlens_q: expected sequences of at most 17 tokens"),
    ("sliding_window_attention", "cu_seqlens_k", 5, 35, "cu_seqlens_k: expected at most 34 (tokens) at the end, got 35"),
    ("rolling_attention", "cu_seqlens_q", 2, 1000, "cu_seqlens_q: expected sequences of at most 2 tokens"),
    ("rolling_attention", "cache_lengths", 1, -1, "cache_lengths: expected 0 to 2147483645"),
    ("rolling_attention", "cache_lengths", 1, HUGE, "cache_lengths: expected 0 to 2147483645"),
    ("rolling_attention", "cache_lengths", 0, 10, "cache_lengths: expected at most 9 (max_cache_length), got 10 at [0]"),
    ("rolling_attention", "cache_slots", 0, 5, "cache_slots: expected 0 to 4, got 5 at [0]"),
    ("rolling_attention", "cache_slots", 0, 1, "cache_slots: expected distinct slots, got 1 again at [1]"),
    ("apply_rope", "positions", 2, -1, "positions: expected 0 to 2147483647, got -1 at [2]"),
]


def check_refused(op, inputs, message, device="cpu"):
    """Both forms raise ValueError with this message (a regular expression), and write nothing."""
    pattern = f"^mixtral_{op}: (?:{message})"
    mutated = [inputs[k] for k in MUTATED.get(op, ()) if inputs[k] is not None]
    before = [t.clone() for t in mutated]
    if op != "apply_rope":
        good = case(op, NAMES[op]).inputs(float_on(device), device)
        outs = outputs(op, good)
        poison = [t.clone() for t in outs]
        with pytest.raises(ValueError, match=pattern):
            getattr(mixtral_ext, op)(**inputs, out=outs if len(outs) > 1 else outs[0])
        assert all(same_bits(o, p) for o, p in zip(outs, poison))
    with pytest.raises(ValueError, match=pattern):
        getattr(mixtral_ext, op)(**inputs)
    assert all(same_bits(t, b) for t, b in zip(mutated, before))


@pytest.mark.parametrize("op, name, change, message", HOST_VISIBLE, ids=lambda x: x if isinstance(x, str) else None)
def test_host_visible(op, name, change, message):
    inputs = case(op, NAMES[op]).inputs(torch.float32)
    inputs[name] = change(inputs[name]) if callable(change) else change
    check_refused(op, inputs, message)


@pytest.mark.gpu
@pytest.mark.parametrize("op, changes, message", CUDA_HOST_VISIBLE, ids=lambda x: "-".join(x) if isinstance(x, dict) else x if x in OPS else "")
def test_host_visible_on_cuda(op, changes, message):
    inputs = case(op, NAMES[op]).inputs(torch.bfloat16, "cuda")
    check_refused(op, inputs | {name: change(inputs[name]) for name, change in changes.items()}, message, "cuda")


@pytest.mark.gpu
def test_columns_that_rows_after_each_other_do_not_align():
    """37 columns: a result of the functional form cannot be stored 16 bytes at a time, one with padded rows can."""
    inputs = case("grouped_gemm", "plain").inputs(torch.bfloat16, "cuda")
    want = mixtral_ext.grouped_gemm(**inputs)[:, :37]
    inputs["b"] = inputs["b"][:, :37]
    with pytest.raises(ValueError, match="^mixtral_grouped_gemm: out: " + STRIDES.format(37, 0)):
        mixtral_ext.grouped_gemm(**inputs)
    out = torch.full((len(want), 40), 7.0, dtype=torch.bfloat16, device="cuda")
    mixtral_ext.grouped_gemm(**inputs, out=out[:, :37])
    assert torch.equal(out[:, :37], want) and (out[:, 37:] == 7).all()


def required(op):
    """The tensors that an op cannot do without. A call without any tensor never reaches the op: torch refuses it."""
    arguments = getattr(torch.ops.mixtral_ext, op).default._schema.arguments
    return [a.name for a in arguments if str(a.type) == "Tensor"] if op not in ("moe_gate", "moe_sort") else []


@pytest.mark.parametrize("op, name", [(op, name) for op in OPS for name in required(op)])
def test_none_for_a_tensor(op, name):
    check_refused(op, case(op, NAMES[op]).inputs(torch.float32) | {name: None}, f"{name}: expected a tensor, got None$")


def bad_values(op, name, index, value):
    inputs = case(op, NAMES[op]).inputs(torch.float32)
    inputs[name] = inputs[name].clone()
    inputs[name][index] = value
    return inputs


@pytest.mark.parametrize("op, name, index, value, message", VALUES, ids=lambda x: x if isinstance(x, str) else None)
def test_values_in_index_arrays(op, name, index, value, message):
    check_refused(op, bad_values(op, name, index, value), re.escape(message))


@pytest.mark.parametrize("op, name, index, value, message", VALUES, ids=lambda x: x if isinstance(x, str) else None)
def test_debug_raises_the_same_message(op, name, index, value, message, device):
    """What the CPU op says of bad values, debug.check_<op> says on any device, and changes nothing."""
    inputs = bad_values(op, name, index, value)
    with pytest.raises(ValueError) as cpu:
        getattr(mixtral_ext, op)(**inputs)
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError) as checked:
        getattr(debug, f"check_{op}")(**inputs)
    assert str(checked.value) == str(cpu.value)
    assert all(same_bits(inputs[k], before[k]) for k in before)


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("moe_gate", "moe_sort")])
def test_debug_accepts_every_case(op, device):
    for c in small_cases(op, device):
        assert getattr(debug, f"check_{op}")(**c.inputs(torch.bfloat16, device)) is None


def test_batched_ranges():
    c = case("sliding_window_attention", "batched_keys")
    for name, value, message in (("k_start", -1, "k_start: expected 0 to 9, got -1 at [1]"),
                                 ("k_start", 10, "k_start: expected 0 to 9, got 10 at [1]"),
                                 ("k_length", 7, "k_length: expected 0 to 6 (keys after k_start), got 7 at [1]"),
                                 ("k_length", -1, "k_length: expected 0 to 6 (keys after k_start), got -1 at [1]")):
        inputs = c.inputs(torch.float32)
        inputs[name][1] = value
        for f in (mixtral_ext.sliding_window_attention, debug.check_sliding_window_attention):
            with pytest.raises(ValueError, match=re.escape(message)):
                f(**inputs)


@pytest.mark.parametrize("name, value, message", [
    ("max_seqlen_q", 6, r"max_seqlen_q: expected 0 or at least 7 \(tokens of q\) without cu_seqlens_q, got 6$"),
    ("max_seqlen_k", 8, r"max_seqlen_k: expected 0 or at least 9 \(tokens of k\) without cu_seqlens_k, got 8$")])
@pytest.mark.parametrize("batch", [(), (1,)], ids=["packed", "batched"])
def test_maxima_below_lengths_that_are_known(batch, name, value, message):
    """Without cu_seqlens the arrays say how long the sequences are."""
    q, k = torch.randn(*batch, 7, 2, 64), torch.randn(*batch, 9, 2, 64)
    out = torch.full_like(q, 7), None
    for f in (mixtral_ext.sliding_window_attention, debug.check_sliding_window_attention):
        with pytest.raises(ValueError, match="^mixtral_sliding_window_attention: " + message):
            f(q, k, k, **{name: value})
    with pytest.raises(ValueError, match=message):
        mixtral_ext.sliding_window_attention(q, k, k, **{name: value}, out=out)
    assert (out[0] == 7).all()
    plain = mixtral_ext.sliding_window_attention(q, k, k)
    for a, b in zip(plain, mixtral_ext.sliding_window_attention(q, k, k, max_seqlen_q=7, max_seqlen_k=9)):
        assert same_bits(a, b)


def test_maxima_below_key_counts():
    c = case("sliding_window_attention", "batched_keys")
    inputs = c.inputs(torch.float32)
    longest = int(inputs["k_length"].max())
    at = int(inputs["k_length"].argmax())
    expected = f"max_seqlen_k: expected at least {longest} (keys of sequence {at}), got {longest - 1}"
    for f in (mixtral_ext.sliding_window_attention, debug.check_sliding_window_attention):
        with pytest.raises(ValueError, match=re.escape(expected)):
            f(**inputs, max_seqlen_k=longest - 1)
        f(**inputs, max_seqlen_k=longest)


@pytest.mark.parametrize("op", ["sliding_window_attention", "rolling_attention"])
@pytest.mark.parametrize("window", [2.5, "3", [3]])
def test_a_window_that_is_no_integer(op, window):
    """Refused by torch, from the schema."""
    inputs = case(op, NAMES[op]).inputs(torch.float32)
    with pytest.raises(RuntimeError, match="for argument 'window' but instead found type"):
        getattr(mixtral_ext, op)(**{**inputs, "window": window})


@pytest.mark.parametrize("op", [op for op in OPS if op != "apply_rope"])
def test_outputs_are_checked(op, device):
    """Wrong dtype, shape, strides or overlap of each result, by its name in the schema."""
    schema = getattr(torch.ops.mixtral_ext, op).out._schema
    names = [a.name for a in schema.arguments if a.kwarg_only]
    for i, name in enumerate(names):
        for change in ("dtype", "shape", "stride"):
            inputs = case(op, NAMES[op]).inputs(float_on(device), device)
            outs = list(outputs(op, inputs))
            good = outs[i]
            if change == "dtype":
                outs[i], message = good.to(torch.float16), "expected dtype .*got float16"
            elif change == "shape":
                outs[i], message = torch.cat([good, good]), "expected shape .*got"
            else:
                outs[i], message = gapped(good), "expected (innermost stride 1|a contiguous tensor).*got"
            before = [t.clone() for t in outs]
            with pytest.raises(ValueError, match=f"^mixtral_{op}: {name}: {message}"):
                getattr(mixtral_ext, op)(**inputs, out=tuple(outs) if len(outs) > 1 else outs[0])
            assert all(same_bits(o, b) for o, b in zip(outs, before))


@pytest.mark.parametrize("op", ["moe_gate", "sliding_window_attention"])
def test_out_that_is_no_tuple_of_the_results(op):
    inputs = {"moe_gate": dict(router_logits=torch.zeros(3, 4)),
              "sliding_window_attention": dict.fromkeys("qkv", torch.zeros(3, 2, 64))}[op]
    for out in (torch.zeros(3, 2), (torch.zeros(3, 2),)):
        with pytest.raises(TypeError, match=f"^mixtral_{op}: out: expected a tuple of [25] tensors, got (Tensor|1)$"):
            getattr(mixtral_ext, op)(**inputs, out=out)


def test_an_output_that_overlaps_itself():
    inputs = case("moe_permute", "plain").inputs(torch.float32)
    with pytest.raises(ValueError, match="rows: expected an output whose elements do not share memory, got overlapping strides"):
        mixtral_ext.moe_permute(**inputs, out=torch.zeros(1, 64).expand(14, 64))


@pytest.mark.parametrize("op", [op for op in OPS if op != "moe_sort"])
def test_tensors_on_different_devices(op):
    """A meta tensor among CPU ones: refused by the fake that torch then calls, and by the CPU kernel itself."""
    inputs = case(op, NAMES[op]).inputs(torch.float32)
    tensors = [k for k, v in inputs.items() if isinstance(v, torch.Tensor)]
    cpu_only = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    overload = getattr(torch.ops.mixtral_ext, op).default
    for name in tensors[1:]:
        args = {**inputs, name: inputs[name].to("meta")}
        message = f"^mixtral_{op}: {name}: expected device cpu \\(as {tensors[0]}\\), got meta$"
        with pytest.raises(ValueError, match=message):
            overload(**args)
        with pytest.raises(ValueError, match=message):
            overload.redispatch(cpu_only, **args)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_cpu_tensors_among_cuda_ones(op):
    """Any one of the tensors on the other device, results included."""
    good = case(op, NAMES[op]).inputs(torch.bfloat16, "cuda")
    overload = getattr(getattr(torch.ops.mixtral_ext, op), "default" if op == "apply_rope" else "out")
    good |= dict(zip([a.name for a in overload._schema.arguments if a.kwarg_only], outputs(op, good)))
    first, *others = [k for k, v in good.items() if isinstance(v, torch.Tensor)]
    for name in others:
        with pytest.raises(ValueError, match=f"^mixtral_{op}: {name}: expected device cuda:0 \\(as {first}\\), got cpu$"):
            overload(**{**good, name: good[name].cpu()})
    with pytest.raises(ValueError, match=f"^mixtral_{op}: {others[0]}: expected device cpu \\(as {first}\\), got cuda:0$"):
        overload(**{**good, first: good[first].cpu()})
