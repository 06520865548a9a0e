"""Calls of the torch ops in both forms, their float64 reference and the error rule, for the tests of the torch ops."""
import pytest
import torch

import mixtral_ext
from mixtral_bench.cases import CASES
from mixtral_ext import reference

OPS = list(CASES)
MOE_OPS = ["moe_gate", "moe_sort", "grouped_gemm", "grouped_gemm_swiglu", "moe_experts"]  # those of an expert layer
FLOAT_POISON, INT_POISON = 12345.0, -77


def skip_unless_on(device, dtype):
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("CUDA kernels take bfloat16 and float16")


def float_on(device):
    """float32, or what CUDA kernels take."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def small_cases(op, device="cpu", dtype=torch.bfloat16):
    """Without the `far` ones outside bfloat16, where their address space doubles."""
    return [c for c in CASES[op] if not c.large and not (c.cpu_only and device == "cuda")
            and not (c.far and dtype != torch.bfloat16)]


def case(op, name):
    return next(c for c in CASES[op] if c.name == name)


def clone(t):
    """A copy of a tensor with its strides, whatever they are; other values as they are."""
    if not isinstance(t, torch.Tensor):
        return t
    copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    return copy.copy_(t) if t.numel() else copy


def poisoned(t):
    return torch.full_like(t, FLOAT_POISON if t.is_floating_point() else INT_POISON)


def outputs(op, inputs):
    """Poisoned tensors as the functional form would allocate them, from meta tensors (the registered fakes)."""
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    device = next(v.device for v in inputs.values() if isinstance(v, torch.Tensor))
    fakes = as_tuple(getattr(mixtral_ext, op)(**meta))
    return tuple(poisoned(torch.empty(f.shape, dtype=f.dtype, device=device)) for f in fakes)


def as_tuple(result):
    return () if result is None else result if isinstance(result, tuple) else (result,)


MUTATED = {"rolling_attention": ("k_cache", "v_cache"), "apply_rope": ("q", "k")}


def call(op, inputs, form="functional"):
    """-> results and then the tensors the op changed; the inputs themselves stay as they are."""
    mutated = MUTATED.get(op, ())
    inputs = {k: clone(v) if k in mutated else v for k, v in inputs.items()}
    f = getattr(mixtral_ext, op)
    if form == "functional":
        results = as_tuple(f(**inputs))
    else:
        results = outputs(op, inputs)
        returned = f(**inputs, out=results if len(results) > 1 else results[0])
        assert returned is (results if len(results) > 1 else results[0])
    return *results, *(inputs[k] for k in mutated)


def forms(op):
    return ["functional"] if op == "apply_rope" else ["functional", "out"]


def expected(op, inputs, dtype=torch.float64):
    # Contiguous: torch's own products are not what is tested where rows lie 2^30 elements apart.
    wide = {k: v.to(dtype).contiguous() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return as_tuple(getattr(reference, op)(**wide))


def relative_error(got, want):
    finite = want.isfinite()
    difference = (got.double() - want.double())[finite].norm()
    return (difference / want[finite].double().norm().clamp_min(1e-30)).item()


def check_results(op, inputs, got, form):
    """Against float64: integers equal; floats at most twice the error of the same formula in torch's low precision, plus
    1e-6; NaN and infinities in the same places; elements the contract leaves unwritten hold the poison (out form)."""
    want = expected(op, inputs)
    dtype = next(v.dtype for v in inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()) \
        if op != "moe_sort" else torch.float32
    low = expected(op, inputs, dtype)
    assert len(got) == len(want)
    for i, (g, w, b) in enumerate(zip(got, want, low)):
        if w is None:
            assert g is None
            continue
        assert g.shape == w.shape, (op, i)
        if not w.is_floating_point():
            assert g.dtype == torch.int32 and torch.equal(g, w), (op, i, g, w)
            continue
        unwritten = torch.zeros_like(w, dtype=torch.bool)
        if op not in ("moe_gate", "apply_rope") and not (op == "rolling_attention" and i >= 2):
            unwritten = w.isnan()
        if form == "out":
            assert (g[unwritten] == FLOAT_POISON).all(), f"{op} result {i}: written outside its rows"
        g, w, b = (t[~unwritten] for t in (g, w, b))
        assert torch.equal(g.isnan(), w.isnan()), (op, i)
        infinite = w.isinf()
        assert torch.equal(g[infinite].double(), w[infinite].double()) and not g[~infinite].isinf().any(), (op, i)
        error, limit = relative_error(g, w), 2 * relative_error(b, w) + 1e-6
        assert error <= limit, f"{op} result {i}: error {error:.3g}, limit {limit:.3g}"


def same_bits(a, b):
    """Equal element for element, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(
        torch.nan_to_num(a, nan=1.5), torch.nan_to_num(b, nan=1.5)) and torch.equal(a.isnan(), b.isnan())
