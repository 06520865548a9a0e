"""Values of the torch ops in every form, against float64."""
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mixtral_ext
from mixtral_bench.cases import MoeExpertsCase
from op_calls import MOE_OPS, MUTATED, OPS, call, case, check_results, clone, float_on, forms, same_bits, skip_unless_on, small_cases

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op, form", [(op, form) for op in OPS for form in forms(op)])
def test_values(op, form, dtype, device):
    skip_unless_on(device, dtype)
    for c in small_cases(op, device, dtype):
        inputs = c.inputs(dtype, device)
        got = call(op, inputs, form)
        try:
            check_results(op, inputs, got, form)
        except AssertionError as error:
            raise AssertionError(f"case {c.name}") from error


@pytest.mark.parametrize("renormalize", [True, False])
def test_infinite_logits_weigh_what_torch_says(renormalize, device):
    inf = float("inf")
    logits = torch.tensor([[inf, 1, 2, 0], [0, inf, inf, 1], [-inf, inf, 0, 1], [-inf, 3, -inf, 1], [-inf, -inf, 2, -inf], 4 * [-inf]],
                          device=device)
    weights, ids, *_ = mixtral_ext.moe_gate(logits, 2, renormalize)
    assert ids.tolist() == [[0, 2], [1, 2], [1, 3], [1, 3], [2, 0], [0, 1]]
    chosen = logits.gather(1, ids.long())
    expected = chosen.softmax(1) if renormalize else logits.softmax(1).gather(1, ids.long())
    assert expected.isnan().any(1).tolist() == 3 * [True] + 2 * [False] + [True]
    torch.testing.assert_close(weights, expected, equal_nan=True)


@pytest.mark.parametrize("maps", [False, True])
def test_same_bits_whatever_else_is_in_the_batch(maps, device):
    """The tokens of a call at once, and so many at a time that CUDA takes another kernel or tile each time. As many numbers
    as here show another order of summation even through bfloat16."""
    make = dict(tokens=800, experts=8, hidden=520, intermediate=264)
    inputs = MoeExpertsCase("", **make).inputs(float_on(device), device)
    weights = dict(w_gate_up=inputs["w_gate_up"], w_down=inputs["w_down"])

    def layer(tokens):
        ids = inputs["topk_ids"][tokens]
        routing = dict(topk_weights=inputs["topk_weights"][tokens], topk_ids=ids)
        if maps:
            routing |= dict(zip(("expert_offsets", "sorted_slots", "slot_rows"), mixtral_ext.moe_sort(ids, make["experts"])))
        return mixtral_ext.moe_experts(inputs["hidden"][tokens], **weights, **routing)

    whole = layer(slice(0, 800))
    for count in (1, 12, 30, 60, 200):
        assert torch.equal(torch.cat([layer(slice(i, i + count)) for i in range(0, 800, count)]), whole), count


@pytest.mark.parametrize("op", OPS)
def test_same_bits_for_any_thread_count_and_run(op):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append([call(op, c.inputs(torch.bfloat16)) for c in small_cases(op)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for c, a, b in zip(small_cases(op), results[0], other):
            for x, y in zip(a, b):
                assert x is y is None or defined_bits_equal(op, c, x, y), c.name


def defined_bits_equal(op, c, x, y):
    """Results of the functional form that the contract leaves undefined are not compared."""
    if op in ("moe_permute", "grouped_gemm", "grouped_gemm_swiglu"):
        inputs = c.inputs(torch.bfloat16)
        rows = int((inputs["sorted_slots"] >= 0).sum()) if op == "moe_permute" else int(inputs["expert_offsets"][-1])
        x, y = x[:rows], y[:rows]
    elif getattr(c, "tail", 0) and x.dim() < 4:
        total = x.shape[0 if x.dim() == 3 else 1] - c.tail
        x, y = (x[:total], y[:total]) if x.dim() == 3 else (x[:, :total], y[:, :total])
    return same_bits(x, y)


@pytest.mark.parametrize("op", [op for op in OPS if op != "apply_rope"])
def test_out_with_other_strides(op, device):
    """Float results may have any outer strides; what lies between their rows is not touched."""
    c = case(op, "decode" if op == "rolling_attention" else "plain")
    inputs = c.inputs(torch.bfloat16, device)
    want = call(op, inputs, "out")
    inputs = {k: clone(v) if k in MUTATED.get(op, ()) else v for k, v in inputs.items()}
    storage, outs = [], []
    for w in want[:len(want) - len(MUTATED.get(op, ()))]:
        if w.dtype != torch.bfloat16:  # lse, weights and maps are contiguous
            outs.append(torch.zeros_like(w))
            continue
        storage.append(torch.full((*w.shape[:-1], w.shape[-1] + 8), -3.0, dtype=w.dtype, device=device))
        outs.append(storage[-1][..., :w.shape[-1]])
    getattr(mixtral_ext, op)(**inputs, out=tuple(outs) if len(outs) > 1 else outs[0])
    for o, w in zip(outs, want):
        assert same_bits(o, w)
    for s in storage:
        assert (s[..., -8:] == -3.0).all()


@pytest.mark.parametrize("op", ["sliding_window_attention", "rolling_attention"])
def test_lse_may_be_left_out(op, device):
    c = case(op, "ragged" if op == "sliding_window_attention" else "chunks")
    want = call(op, c.inputs(float_on(device), device), "out")
    out = torch.full_like(want[0], 12345.0)
    getattr(mixtral_ext, op)(**c.inputs(float_on(device), device), out=(out, None))
    assert same_bits(out, want[0])


def test_far_output_rows(device):
    """Rows of the result more than 2^31 elements apart."""
    c = case("moe_permute", "far")
    inputs = c.inputs(torch.bfloat16, device)
    out = torch.empty_like(inputs["hidden"], memory_format=torch.preserve_format)
    far = torch.empty_strided(out.shape, inputs["hidden"].stride(), dtype=out.dtype, device=device)
    mixtral_ext.moe_permute(**inputs, out=far)
    assert torch.equal(far.contiguous(), inputs["hidden"][inputs["sorted_slots"].long()].contiguous())


def test_rolling_attention_over_many_steps_is_sliding_window_attention():
    """Prefill in uneven chunks, then decode, against one call over the whole sequence."""
    torch.manual_seed(0)
    tokens, capacity, window = 45, 12, 9
    q, k, v = (torch.randn(tokens, heads, 64) for heads in (4, 2, 2))
    want, want_lse = mixtral_ext.sliding_window_attention(q, k, v, window=window)
    k_cache, v_cache = (torch.full((1, capacity, 2, 64), float("nan")) for _ in range(2))
    done = 0
    for n in (1, 7, 12, 20, 1, 1, 1, 2):
        out, lse = mixtral_ext.rolling_attention(
            q[done:done + n], k[done:done + n], v[done:done + n], k_cache, v_cache,
            torch.tensor([0, n], dtype=torch.int32), torch.tensor([done], dtype=torch.int32), window=window)
        torch.testing.assert_close(out, want[done:done + n], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, want_lse[:, done:done + n], rtol=1e-5, atol=1e-5)
        done += n
    assert done == tokens


def test_calls_from_several_threads():
    """Python threads share the CPU context: each gets what it would get alone."""
    calls = [(op, case(op, name).inputs(torch.bfloat16)) for op, name in
             (("moe_gate", "many_tokens"), ("moe_experts", "row_tile_edges"), ("sliding_window_attention", "window_tile_edges"))]
    want = [call(op, inputs) for op, inputs in calls]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda c: call(*c), calls * 8))
    for i, results in enumerate(got):
        assert all(same_bits(a, b) for a, b in zip(results, want[i % len(calls)]))


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["moe_permute", *MOE_OPS])
def test_current_stream_and_device(op):
    """The op comes after what the current stream has to do, and leaves the current device alone."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    inputs = case(op, "plain").inputs(torch.bfloat16, device)
    want = call(op, inputs)
    name = next(k for k, v in inputs.items() if isinstance(v, torch.Tensor))
    late = torch.zeros_like(inputs[name])
    assert not all(same_bits(a, b) for a, b in zip(call(op, {**inputs, name: late}), want))  # too early would be seen
    torch.cuda.synchronize(device)
    stream, before = torch.cuda.Stream(device), torch.cuda.current_device()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(inputs[name])
        got = call(op, {**inputs, name: late})
    stream.synchronize()
    assert torch.cuda.current_device() == before
    assert all(same_bits(a, b) for a, b in zip(got, want))
