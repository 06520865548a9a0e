"""grouped_gemm and grouped_gemm_swiglu of the C API on the CPU: every instruction set, natively where this machine has it
and emulated everywhere."""
import numpy as np
import pytest
import torch

import c_api
from mixtral_bench.cases import CASES
from mixtral_ext import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = [case for op in ("grouped_gemm", "grouped_gemm_swiglu") for case in CASES[op] if not case.large]
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
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}-{case}")
def test_accuracy(cpu_build, case, dtype):
    library, arch = cpu_build
    inputs = case.inputs(DTYPES[dtype])
    out = run(library, library.context(arch), case.op, inputs)
    used = int(inputs["expert_offsets"][-1])
    formula = getattr(reference, case.op)
    assert_accurate(out, formula(**inputs)[:used], formula(**widened(inputs))[:used])
