"""moe_experts of the C API on the CPU: every instruction set, natively where this machine has it and emulated everywhere."""
import math

import pytest
import torch

import c_api
from mixtral_bench.cases import CASES, HUGE, MoeExpertsCase
from mixtral_ext import reference
from test_grouped_gemm import DTYPES, assert_accurate, fields, numpy, widened

SMALL = [case for case in CASES["moe_experts"] if not case.large]
KERNEL_EDGES = [
    MoeExpertsCase("passes", tokens=700, hidden=9, intermediate=7),  # 1400 rows: two passes
    MoeExpertsCase("blocks", tokens=31, experts=2, hidden=530, intermediate=1030),
    MoeExpertsCase("many_experts", tokens=9, experts=256, top_k=8, hidden=16, intermediate=8),
    MoeExpertsCase("no_hidden", tokens=3, hidden=0),
]


def run(lib, context, inputs):
    """-> out [T, H], read back from a poisoned array with a gap after each row."""
    tokens, hidden = inputs["hidden"].shape
    whole = torch.full((tokens + 1, hidden + 5), 77.0, dtype=inputs["hidden"].dtype)
    lib.call("moe_experts", context, **fields(inputs), out=numpy(whole[:tokens, :hidden]))
    assert (whole[tokens:] == 77.0).all() and (whole[:, hidden:] == 77.0).all()
    return whole[:tokens, :hidden].clone()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL + KERNEL_EDGES, ids=str)
def test_accuracy(cpu_build, case, dtype):
    library, arch = cpu_build
    inputs = case.inputs(DTYPES[dtype])
    out = run(library, library.context(arch), inputs)
    assert_accurate(out, reference.moe_experts(**inputs), reference.moe_experts(**widened(inputs)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_bits(cpu_build, dtype):
    library, arch = cpu_build
    inputs = MoeExpertsCase("", tokens=37, hidden=72, intermediate=150, routing="skips").inputs(DTYPES[dtype])
    one, again, two = (run(library, library.context(arch, threads=n), inputs) for n in (1, 1, 2))
    assert torch.equal(one, again) and torch.equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_company(cpu_build, dtype):
    """Bitwise, of experts with one row to a hundred."""
    library, arch = cpu_build
    context = library.context(arch)
    inputs = MoeExpertsCase("", tokens=140, experts=3, hidden=72, intermediate=150).inputs(DTYPES[dtype])
    whole = run(library, context, inputs)
    for first, count in [(0, 1), (5, 2), (77, 8), (90, 41)]:
        part = inputs | {name: inputs[name][first:first + count] for name in ("hidden", "topk_weights", "topk_ids")}
        assert torch.equal(run(library, context, part), whole[first:first + count])


@pytest.mark.parametrize("dtype", DTYPES)
def test_given_maps_change_nothing(cpu_build, dtype):
    library, arch = cpu_build
    case = dict(tokens=23, hidden=40, intermediate=24, routing="skips")
    sorts, given = (run(library, library.context(arch), MoeExpertsCase("", **case, maps=maps).inputs(DTYPES[dtype]))
                    for maps in (False, True))
    assert torch.equal(sorts, given)


@pytest.mark.parametrize("maps", (False, True))
def test_more_choices_than_experts(lib, maps):
    """K <= E is asked for by moe_gate alone: routing made elsewhere may name an expert twice."""
    inputs = MoeExpertsCase("", tokens=5, experts=2, top_k=2).inputs(torch.float32)
    inputs |= dict(topk_weights=torch.rand(5, 3), topk_ids=torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, -1], [2, 0, 1]]))
    expected = reference.moe_experts(**widened(inputs))
    if maps:
        names = ("expert_offsets", "sorted_slots", "slot_rows")
        sizes = ((3,), (15,), (5, 3))
        inputs |= {name: torch.full(size, HUGE, dtype=torch.int32) for name, size in zip(names, sizes)}
        lib.call("moe_sort", lib.context(), topk_ids=inputs["topk_ids"].numpy(), num_experts=2,
                 **{name: inputs[name].numpy() for name in names})
        inputs["topk_ids"] = torch.full((5, 3), HUGE)  # not read
    torch.testing.assert_close(run(lib, lib.context(), inputs).double(), expected, rtol=1e-5, atol=1e-5)


def test_experts_without_rows_are_not_read(cpu_build):
    library, arch = cpu_build
    inputs = MoeExpertsCase("", tokens=20, experts=4, routing="few").inputs(torch.bfloat16)
    for name in ("w_gate_up", "w_down"):
        inputs[name][[0, 3]] = math.nan
    assert run(library, library.context(arch), inputs).isfinite().all()


@pytest.mark.parametrize("name, index, value, text", [
    ("expert_offsets", 0, 1, "expert_offsets: expected 0 at [0], got 1"),
    ("expert_offsets", 2, 15, "expert_offsets: expected"),
    ("sorted_slots", 3, -1, "sorted_slots: expected 0 to 13, got -1 at element 3"),
    ("sorted_slots", 3, 14, "sorted_slots: expected 0 to 13, got 14 at element 3"),
    ("slot_rows", 5, -2, "slot_rows: expected -1 to 13, got -2 at element 5"),
    ("slot_rows", 5, 14, "slot_rows: expected -1 to 13, got 14 at element 5"),
    ("slot_rows", 5, HUGE, f"slot_rows: expected -1 to 13, got {HUGE} at element 5"),
])
def test_bad_maps_are_refused_before_anything_is_written(lib, name, index, value, text):
    inputs = MoeExpertsCase("", tokens=7, maps=True).inputs(torch.float32)
    inputs[name].view(-1)[index] = value
    out = torch.full((7, 64), 77.0)
    with pytest.raises(c_api.MixtralError) as error:
        lib.call("moe_experts", lib.context(), **fields(inputs), out=numpy(out))
    assert error.value.status == c_api.INVALID_ARGUMENT
    assert f"mixtral_moe_experts: {text}" in error.value.message
    assert (out == 77.0).all()
