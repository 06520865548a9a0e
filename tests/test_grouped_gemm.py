"""grouped_gemm and grouped_gemm_swiglu of the C API on the CPU: every instruction set, natively where this machine has it
and emulated everywhere."""
import pytest
import torch

import c_api
from mixtral_bench.cases import CASES, HUGE, GroupedGemmCase, GroupedGemmSwigluCase
from mixtral_ext import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = [case for op in ("grouped_gemm", "grouped_gemm_swiglu") for case in CASES[op] if not case.large]
# The kernels' own edges: token tiles of 1 to 6 and of 16, chunks of 96 tokens, k in blocks of 512 and 1024, 128 weight
# rows a task, and the pass boundary at 1024 rows.
KERNEL_EDGES = [kind(name, **sizes, cpu_only=True) for kind in (GroupedGemmCase, GroupedGemmSwigluCase) for name, sizes in {
    "token_tiles": dict(segments=(1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 32, 33), inner=40, outer=21),
    "blocks": dict(segments=(3, 131), inner=1101, outer=75),
    "many_columns": dict(segments=(20, 1), inner=33, outer=261),
    "passes": dict(segments=(700, 0, 1400), inner=5, outer=3, gather=2),
    "no_inner": dict(segments=(3, 20), inner=0, outer=5),
    "no_columns": dict(segments=(3, 20), inner=8, outer=0),
    "no_rows_at_all": dict(segments=(0, 0), inner=8, outer=8),
}.items()]
WEIGHTS = {"grouped_gemm": "b", "grouped_gemm_swiglu": "w_gate_up"}


def numpy(t):
    """The same memory and strides; bfloat16 as its bits."""
    return t.view(torch.uint16).numpy() if t.dtype == torch.bfloat16 else t.numpy()


def fields(inputs):
    return {name: numpy(value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def output(op, inputs):
    """Poisoned `out` with a gap after each row, and its full memory."""
    rows = inputs.get("a_rows", inputs["a"]).shape[0]
    columns = inputs[WEIGHTS[op]].shape[1] // (2 if op == "grouped_gemm_swiglu" else 1)
    whole = torch.full((rows + 1, columns + 3), 77.0, dtype=inputs["a"].dtype)
    return whole, whole[:rows, :columns]


def run(lib, context, op, inputs):
    """-> out [R, N]; checks that nothing but the rows in range was written."""
    whole, out = output(op, inputs)
    lib.call(op, context, **fields(inputs), out=numpy(out))
    used = int(inputs["expert_offsets"][-1])
    untouched = whole.clone()
    untouched[:used, :out.shape[1]] = 77.0
    assert (untouched == 77.0).all(), "wrote outside the rows in range"
    return out[:used].clone()


def widened(inputs):
    return {name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()}


def relative_error(value, exact):
    return float((value.double() - exact).norm() / exact.norm()) if exact.norm() > 0 else float(value.double().norm())


def assert_accurate(value, low_precision, exact):
    """No further from float64 than twice the same formula in low-precision torch, plus 1e-6."""
    assert torch.isfinite(value).all()
    assert relative_error(value, exact) <= 2 * relative_error(low_precision, exact) + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL + KERNEL_EDGES, ids=lambda case: f"{case.op}-{case}")
def test_accuracy(cpu_build, case, dtype):
    library, arch = cpu_build
    inputs = case.inputs(DTYPES[dtype])
    out = run(library, library.context(arch), case.op, inputs)
    used = int(inputs["expert_offsets"][-1])
    formula = getattr(reference, case.op)
    assert_accurate(out, formula(**inputs)[:used], formula(**widened(inputs))[:used])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_bits(cpu_build, dtype):
    library, arch = cpu_build
    for case in KERNEL_EDGES[:2]:
        inputs = case.inputs(DTYPES[dtype])
        one, again, two = (run(library, library.context(arch, threads=n), case.op, inputs) for n in (1, 1, 2))
        assert torch.equal(one, again) and torch.equal(one, two)


@pytest.mark.parametrize("op", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_company(cpu_build, op, dtype):
    """Bitwise."""
    library, arch = cpu_build
    context = library.context(arch)
    kind = GroupedGemmCase if op == "grouped_gemm" else GroupedGemmSwigluCase
    inputs = kind("", segments=(140,), inner=1101, outer=20).inputs(DTYPES[dtype])
    whole = run(library, context, op, inputs)
    for first, count in [(0, 1), (5, 2), (77, 8), (0, 9), (5, 16), (90, 41)]:
        part = {**inputs, "a": inputs["a"][first:first + count], "expert_offsets": torch.tensor([0, count], dtype=torch.int32)}
        assert torch.equal(run(library, context, op, part), whole[first:first + count])


def test_not_a_number_stays_in_its_row_and_column(cpu_build):
    library, arch = cpu_build
    for dtype in DTYPES.values():
        inputs = GroupedGemmCase("", segments=(2, 19), inner=70, outer=37).inputs(dtype)
        inputs["a"][4, 69] = float("nan")
        inputs["b"][1, 36, 0] = float("inf")
        out = run(library, library.context(arch), "grouped_gemm", inputs)
        assert out[4].isnan().all()
        assert not out[torch.arange(21) != 4, :36].isnan().any()
        assert out[2:, 36][torch.arange(19) != 2].isinf().all() and out[:2].isfinite().all()


def test_swiglu_extremes_follow_the_formula(cpu_build):
    """x -> silu(x) * x in f32. Below -88.7 exp(-x) is infinite in f32, and the result 0; exactly it is under 1e-35 there."""
    library, arch = cpu_build
    x = torch.tensor([-200.0, -104.5, -90.0, -88.0, -20.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 20.0, 88.0, 200.0])
    inputs = dict(a=x[:, None], w_gate_up=torch.ones(1, 2, 1), expert_offsets=torch.tensor([0, len(x)], dtype=torch.int32))
    out = run(library, library.context(arch), "grouped_gemm_swiglu", inputs)
    exact = reference.grouped_gemm_swiglu(**widened(inputs))
    torch.testing.assert_close(out.double(), exact, rtol=5e-7, atol=1e-35)


@pytest.mark.parametrize("op", WEIGHTS)
@pytest.mark.parametrize("name, index, value, text", [
    ("expert_offsets", 0, 1, "expert_offsets: expected 0 at [0], got 1"),
    ("expert_offsets", 1, 9, "expert_offsets: expected 0 to 8 at [1], got 9"),
    ("expert_offsets", 2, 2, "expert_offsets: expected 3 to 8 at [2], got 2"),
    ("expert_offsets", 3, 9, "expert_offsets: expected 5 to 8 at [3], got 9"),
    ("a_rows", 0, -1, "a_rows: expected 0 to 7, got -1 in row 0"),
    ("a_rows", 4, 8, "a_rows: expected 0 to 7, got 8 in row 4"),
])
def test_bad_values_are_refused_before_anything_is_written(lib, op, name, index, value, text):
    kind = GroupedGemmCase if op == "grouped_gemm" else GroupedGemmSwigluCase
    inputs = kind("", segments=(3, 2, 1), tail=2, gather=2, inner=8, outer=4).inputs(torch.float32)
    inputs["a"] = torch.zeros(4, 8)
    inputs["expert_offsets"] = torch.tensor([0, 3, 5, 6], dtype=torch.int32)
    inputs["a_rows"] = torch.tensor([0, 7, 3, 2, 1, 4, HUGE, HUGE], dtype=torch.int32)
    run(lib, lib.context(), op, inputs)
    inputs[name][index] = value
    whole, out = output(op, inputs)
    with pytest.raises(c_api.MixtralError) as error:
        lib.call(op, lib.context(), **fields(inputs), out=numpy(out))
    assert error.value.status == c_api.INVALID_ARGUMENT
    assert f"mixtral_{op}: {text}" in error.value.message
    assert (whole == 77.0).all()
