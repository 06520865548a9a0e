"""The library's CUDA ops through the C API on the virtual GPU: the small cases of every op's ordinary list, on both architectures and
under several schedules, and what they cost beside what they must."""
import json
import math

import numpy as np
import pytest
import torch

import c_api
import vgpu
from attention_checks import assert_accurate, numpy, widened
from mixtral_bench.cases import CASES, HUGE, ApplyRopeCase, MoeCombineCase, MoePermuteCase
from mixtral_ext import reference

OPS = ("moe_permute", "moe_combine", "grouped_gemm", "grouped_gemm_swiglu", "moe_experts", "apply_rope")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
UNTOUCHED = 77.0
GAP = 16  # elements after each row of an output: 32 bytes, so that rows keep the alignment that the costs assume


def small(op):
    return [case for case in CASES[op] if not case.large and not case.cpu_only]


def shape(op, inputs):
    """(rows, columns) of the result."""
    if op == "moe_permute":
        rows, columns = len(inputs["sorted_slots"]), inputs["hidden"].shape[1]
    elif op == "moe_combine":
        rows, columns = len(inputs["slot_rows"]), inputs["rows"].shape[1]
    elif op == "moe_experts":
        rows, columns = inputs["hidden"].shape
    else:
        rows, columns = len(inputs.get("a_rows", inputs["a"])), inputs["b"].shape[1] if "b" in inputs else inputs["w_gate_up"].shape[1] // 2
    return rows, columns


def run(gpu, op, inputs):
    """-> results as the reference gives them. Outputs have a gap after each row, which must stay as it is."""
    fields = {name: numpy(x) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    if op == "apply_rope":
        turned = {name: None if inputs[name] is None else torch.empty_strided(inputs[name].shape, inputs[name].stride(), dtype=inputs[name].dtype)
                  .copy_(inputs[name]) for name in "qk"}
        gpu.call(op, **{**fields, **{name: None if x is None else numpy(x) for name, x in turned.items()}})
        return turned["q"], turned["k"]
    name = "rows" if op == "moe_permute" else "out"
    rows, columns = shape(op, inputs)
    whole = torch.full((rows, -(-columns // 8) * 8 + GAP), UNTOUCHED, dtype=next(x.dtype for x in inputs.values() if x.is_floating_point()))
    out = whole[:, :columns]
    gpu.call(op, outputs=(name,), **fields, **{name: numpy(out)})
    assert (whole[:, columns:] == UNTOUCHED).all()
    return (out,)


def results(op, inputs):
    out = getattr(reference, op)(**inputs)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("op, case", [(op, case) for op in OPS for case in small(op)], ids=lambda x: str(x))
def test_cases(op, case, arch, dtype):
    inputs = case.inputs(DTYPES[dtype])
    exact, low = results(op, widened(inputs)), results(op, inputs)
    first = None
    for seed in range(3):
        got = run(vgpu.Gpu(arch=arch, seed=seed), op, inputs)
        first = first or got
        for value, again, rounded, wide in zip(got, first, low, exact):
            if wide is None:
                continue
            if op == "moe_permute":  # rows of skipped slots stay untouched
                used = inputs["sorted_slots"] >= 0
                assert (value[~used] == UNTOUCHED).all()
                assert torch.equal(value[used], rounded[used])
            elif op.startswith("grouped_gemm"):  # rows past the last offset stay untouched
                used = int(inputs["expert_offsets"][-1])
                assert (value[used:] == UNTOUCHED).all()
                assert_accurate(value[:used], rounded[:used], wide[:used])
            else:
                assert_accurate(value, rounded, wide)
            assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(again))


def test_every_statement_is_covered():
    lib = vgpu.library()
    kernels = [k for i in range(lib.c.vgpu_library_modules()) for k in json.loads(lib.c.vgpu_describe(lib.c.vgpu_library_module(i)))]
    assert len(kernels) >= 2 * (2 + 2 + 8 + 8 + 16)
    assert not [k["uncovered"] for k in kernels if k["uncovered"]]


def test_resources():
    """No kernel spills; rope's 32 bytes of stack are the range reduction of sinf and cosf. Accumulators need more registers
    (test_grouped_kernels.py, test_attention_kernels.py)."""
    for ptx in vgpu.Gpu().library_ptx():
        for name, r in vgpu.resources(ptx).items():
            most = 255 if "grouped_gemm" in name or "attention_" in name else 128
            assert r["spills"] == 0 and r["registers"] <= most and not r["wgmma_warnings"], (name, r)


def cost(op, case, arch):
    gpu = vgpu.Gpu(arch=arch)
    run(gpu, op, case.inputs(torch.bfloat16))
    return gpu.counters[-1]


# Sectors of 32 bytes. Each kernel reads and writes its rows once; a warp also reads a few bytes of indices, a sector each.

@pytest.mark.parametrize("arch", (80, 90))
def test_cost_of_moe_permute(arch):
    tokens, top_k, hidden = 6, 2, 1024
    c = cost("moe_permute", MoePermuteCase("", tokens=tokens, top_k=top_k, hidden=hidden), arch)
    compiled, = (ptx for ptx in vgpu.Gpu.library_ptx() if c["kernel"] in ptx and f".target sm_{arch}" in ptx)
    assert c["registers"] == vgpu.resources(compiled)[c["kernel"]]["registers"] > 0
    rows, sectors = tokens * top_k, hidden * 2 // 32
    assert c["global_store_bytes"] == rows * hidden * 2 and c["global_store_sectors"] == rows * sectors
    assert c["global_load_sectors"] == rows * (sectors + 4)  # four warps read the row's slot


@pytest.mark.parametrize("arch", (80, 90))
def test_cost_of_moe_combine(arch):
    tokens, top_k, hidden = 5, 2, 1024
    c = cost("moe_combine", MoeCombineCase("", tokens=tokens, top_k=top_k, hidden=hidden), arch)
    sectors = hidden * 2 // 32
    assert c["global_store_bytes"] == tokens * hidden * 2 and c["global_store_sectors"] == tokens * sectors
    assert c["global_load_sectors"] == tokens * top_k * (sectors + 2 * 4)  # row and weight, by four warps


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("arch", (80, 90))
def test_cost_of_apply_rope(arch, interleaved):
    tokens, heads, key_heads, head_dim = 3, 4, 2, 64
    c = cost("apply_rope", ApplyRopeCase("", tokens=tokens, heads=heads, key_heads=key_heads, head_dim=head_dim, interleaved=interleaved), arch)
    bytes_ = tokens * (heads + key_heads) * head_dim * 2
    assert c["global_store_bytes"] == bytes_ and c["global_store_sectors"] == bytes_ // 32
    assert c["global_load_sectors"] == bytes_ // 32 + tokens * 4  # four warps read the position
    assert c["warp_instructions"]["barrier"] == tokens * 4


@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("bad", (-1, -HUGE - 1, HUGE, 14))
def test_bad_indices_are_skipped(arch, bad):
    """Nothing is read or written for them: 14 slots of 7 tokens, 14 rows."""
    gpu = vgpu.Gpu(arch=arch)
    inputs = MoePermuteCase("", tokens=7).inputs(torch.bfloat16)
    inputs["sorted_slots"][3] = bad
    rows, = run(gpu, "moe_permute", inputs)
    assert (rows[3] == UNTOUCHED).all() and (rows[4] != UNTOUCHED).any()

    inputs = MoeCombineCase("", tokens=7).inputs(torch.bfloat16)
    inputs["slot_rows"][2, 1] = bad
    inputs["topk_weights"][2, 1] = math.nan
    out, = run(gpu, "moe_combine", inputs)
    row = inputs["rows"][inputs["slot_rows"][2, 0].long()].double() * inputs["topk_weights"][2, 0].double()
    torch.testing.assert_close(out[2].double(), row, rtol=2**-8, atol=1e-6)

    inputs = ApplyRopeCase("", tokens=5, positions_dtype=torch.int64).inputs(torch.bfloat16)
    inputs["positions"][1] = {14: 2**31, HUGE: 2**62}.get(bad, bad)
    q, _ = run(gpu, "apply_rope", inputs)
    assert torch.equal(q[1], inputs["q"][1]) and not torch.equal(q[2], inputs["q"][2])


@pytest.mark.parametrize("op", [*OPS, "moe_gate", "moe_sort"])
def test_an_error_that_was_there_before_is_not_ours(op):
    """It stays for whoever asks for it, and the op does its work."""
    gpu, case = vgpu.Gpu(), next(case for case in small(op) if case.name in ("plain", "one_token"))
    inputs = case.inputs(torch.bfloat16)
    want, lib = results(op, inputs), vgpu.library()
    names = dict(moe_gate=("topk_weights", "topk_ids", "expert_offsets", "sorted_slots", "slot_rows"),
                 moe_sort=("expert_offsets", "sorted_slots", "slot_rows")).get(op)
    lib.c.cudaSetDevice(99)
    try:
        if names:
            outs = [torch.full_like(w, UNTOUCHED) for w in want]
            gpu.call(op, outputs=names, **{name: numpy(x) if isinstance(x, torch.Tensor) else int(x) for name, x in inputs.items()},
                     **{name: numpy(x) for name, x in zip(names, outs)})
            assert all(torch.equal(out, w) for out, w in zip(outs[-3:], want[-3:]))
        else:
            run(gpu, op, inputs)
    finally:
        assert lib.c.cudaGetLastError() == 101  # cudaErrorInvalidDevice


def test_contexts():
    vgpu.Gpu(arch=80).start()
    lib = vgpu.library()
    assert lib.context(device="cuda").arch == "sm80"
    with pytest.raises(c_api.MixtralError, match="arch: expected compute capability 9.0 for sm_90, got 8.0"):
        lib.context("sm90", device="cuda")
    with pytest.raises(c_api.MixtralError, match="device_index: expected 0 to 0, got 1"):
        lib.context(device="cuda", index=1)
    vgpu.Gpu(arch=90).start()
    assert lib.context(device="cuda").arch == "sm90" and lib.context("sm80", device="cuda").arch == "sm80"


def test_unmapped_memory_is_out_of_range():
    """An array that the test forgot, or one that a kernel must not write, is reported and not touched."""
    inputs = MoePermuteCase("", tokens=3).inputs(torch.bfloat16)
    gpu, rows = vgpu.Gpu(), np.full((6, 64), 7, np.uint16)
    context = gpu.lib.context(device="cuda")
    arrays = [(name, numpy(inputs[name]), False, True) for name in ("hidden", "sorted_slots")]
    for more, kind in (([], "out-of-range"), ([("rows", rows, False, True)], "read-only")):
        gpu.start()
        with gpu.mapped(arrays + more), pytest.raises(vgpu.Failure) as failure:
            gpu.lib.call("moe_permute", context, **{name: numpy(x) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}, rows=rows)
            gpu.finish()
        lines = (vgpu.CSRC / "cuda/moe_permute.cu").read_text().splitlines()
        line = next(i for i, text in enumerate(lines, 1) if "store8(to" in text)
        assert {r["kind"] for r in failure.value.reports} == {kind} and failure.value.reports[0]["where"].endswith(f"moe_permute.cu:{line}")
        assert (rows == 7).all()
