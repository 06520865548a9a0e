"""What the tests of sliding_window_attention, rolling_attention and apply_rope share: torch inputs to the C API, and the
error rule."""
import math

import pytest
import torch

import c_api

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def numpy(t):
    """The same memory and strides; bfloat16 as its bits."""
    return t.view(torch.uint16).numpy() if t.dtype == torch.bfloat16 else t.numpy()


def call(library, context, op, **fields):
    library.call(op, context, **{name: numpy(x) if isinstance(x, torch.Tensor) else x for name, x in fields.items()})


def gapped(shape, dtype):
    """NaN memory with a gap after each innermost row: the whole, and the view of `shape`."""
    whole = torch.full((*shape[:-1], shape[-1] + 3), math.nan, dtype=dtype)
    return whole, whole[..., :shape[-1]]


def same_bits(a, b):
    integer = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def widened(inputs):
    return {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in inputs.items()}


def relative_error(value, exact):
    norm = exact.norm()
    return float((value.double() - exact).norm() / norm) if norm > 0 else float(value.double().norm())


def assert_accurate(value, low_precision, exact):
    """No further from float64 than twice the same formula in low-precision torch, plus 1e-6; NaN and -inf where it has them."""
    assert torch.equal(value.isnan(), exact.isnan())
    assert torch.equal(value.isneginf(), exact.isneginf())
    finite = exact.isfinite()
    assert relative_error(value[finite], exact[finite]) <= 2 * relative_error(low_precision[finite], exact[finite]) + 1e-6


def assert_refused(library, context, op, match, written, **fields):
    """The call is an INVALID_ARGUMENT whose message matches, and leaves `written` as it is."""
    before = [x.clone() for x in written]
    with pytest.raises(c_api.MixtralError, match=match) as error:
        call(library, context, op, **fields)
    assert error.value.status == c_api.INVALID_ARGUMENT
    assert all(same_bits(a, b) for a, b in zip(before, written))
