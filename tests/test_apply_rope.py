"""apply_rope of the C API on the CPU."""
import math

import pytest
import torch

from attention_checks import DTYPES, assert_accurate, assert_refused, call, same_bits
from mixtral_bench.cases import CASES
from mixtral_ext import reference

OP = "apply_rope"
SMALL = [case for case in CASES[OP] if not case.large]


def run(library, context, inputs):
    """-> q, k turned; the given ones stay as they are."""
    turned = {}
    for name in "qk":
        given = inputs[name]
        turned[name] = None if given is None else torch.empty_strided(given.shape, given.stride(), dtype=given.dtype).copy_(given)
    call(library, context, OP, **{**inputs, **turned})
    return turned["q"], turned["k"]


def from_f32_angles(inputs):
    """float64 rotation by the angles that the contract fixes in f32."""
    head_dim = inputs["q"].shape[2]
    frequency = 1 / (inputs["theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim).double()).float()
    angle = (inputs["positions"].float()[:, None, None] * frequency).double()

    def turn(x):
        if x is None:
            return None
        x = x.double()
        a, b = (x[..., 0::2], x[..., 1::2]) if inputs["interleaved"] else x.chunk(2, dim=-1)
        turned = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
        return torch.stack(turned, dim=-1).flatten(-2) if inputs["interleaved"] else torch.cat(turned, dim=-1)
    return turn(inputs["q"]), turn(inputs["k"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_cases(lib, case, dtype):
    inputs = case.inputs(DTYPES[dtype])
    result = run(lib, lib.context(), inputs)
    low, exact = reference.apply_rope(**inputs), from_f32_angles(inputs)
    for value, rounded, wide in zip(result, low, exact):
        if wide is not None:
            assert_accurate(value, rounded, wide)
    for a, b in zip(result, run(lib, lib.context(threads=2), inputs)):
        assert a is None or same_bits(a, b)


@pytest.mark.parametrize("interleaved", (False, True), ids=("half_split", "interleaved"))
@pytest.mark.parametrize("position", (0, 1, 32767, 2**24 + 1, 2**31 - 1))
def test_one_rounding_at_any_position(lib, position, interleaved):
    """f32 results within an ulp or two of the exact rotation by the f32 angle, however large it is."""
    make = torch.Generator().manual_seed(1)
    inputs = dict(q=torch.randn(1, 3, 128, generator=make), k=torch.randn(1, 2, 128, generator=make),
                  positions=torch.tensor([position]), theta=1e6, interleaved=interleaved)
    for value, exact in zip(run(lib, lib.context(), inputs), from_f32_angles(inputs)):
        torch.testing.assert_close(value.double(), exact, rtol=3e-7, atol=5e-7)


@pytest.mark.parametrize("theta", (1e4, 1e6))
def test_equals_transformers(lib, theta):
    from transformers import MistralConfig
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding, apply_rotary_pos_emb
    config = MistralConfig(hidden_size=4 * 128, num_attention_heads=4, num_key_value_heads=2, head_dim=128, max_position_embeddings=32768,
                           rope_parameters=dict(rope_type="default", rope_theta=theta))
    make = torch.Generator().manual_seed(2)
    q, k = torch.randn(50, 4, 128, generator=make), torch.randn(50, 2, 128, generator=make)
    positions = torch.arange(32700, 32750)
    cos, sin = MistralRotaryEmbedding(config)(q, positions[None])
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    result = run(lib, lib.context(), dict(q=q, k=k, positions=positions, theta=theta, interleaved=False))
    for value, theirs in zip(result, expected):
        # torch's f32 power misses the nearest number for 1 of the 64 frequencies of theta 1e6: 2^-24 of an angle of up to 12
        torch.testing.assert_close(value, theirs[0].transpose(0, 1), rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("positions, match", [
    (torch.tensor([0, -1, 2], dtype=torch.int32), r"positions: expected 0 to 2147483647, got -1 at \[1\]"),
    (torch.tensor([0, 1, 2**31]), r"positions: expected 0 to 2147483647, got 2147483648 at \[2\]"),
    (torch.tensor([-2**63, 1, 2]), r"positions: expected 0 to 2147483647, got -9223372036854775808 at \[0\]"),
])
def test_bad_positions(lib, positions, match):
    q, k = torch.randn(3, 2, 64), torch.randn(3, 1, 64)
    assert_refused(lib, lib.context(), OP, match, (q, k), q=q, k=k, positions=positions, theta=1e4)


def test_nan_stays_in_its_pair(lib):
    q = torch.zeros(1, 1, 64)
    q[0, 0, 5] = math.nan
    call(lib, lib.context(), OP, q=q, positions=torch.tensor([3]), theta=1e4)
    assert q.isnan().nonzero()[:, 2].tolist() == [5, 37]
