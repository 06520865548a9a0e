"""What a launch is given: arrays that overlap are one memory, and what makes no sense is refused with what was expected and got."""
import subprocess
import sys

import numpy as np
import pytest

import vgpu
from raw_ptx import caught, kernel, run

COPY = "ld.global.u32 %r1, [%x0]; st.global.u32 [%x1], %r1;"


def test_arrays_that_overlap():
    x = np.arange(64, dtype=np.uint32)
    run("ld.global.u32 %r1, [%x0]; add.u32 %r1, %r1, 1; st.global.u32 [%x1], %r1;", x, x, block=64, written={1})
    np.testing.assert_array_equal(x, np.arange(1, 65))
    run(COPY, x, x[32:], block=32, written={1})
    np.testing.assert_array_equal(x[32:], x[:32])
    packed = np.zeros((32, 2), np.uint32)  # columns of one array: one is read, the other written
    packed[:, 0] = np.arange(32)
    run("shl.b32 %r1, %t, 3; cvt.u64.u32 %l1, %r1; add.u64 %l2, %a0, %l1; add.u64 %l3, %a1, %l1; ld.global.u32 %r2, [%l2]; st.global.u32 [%l3], %r2;",
        packed[:, 0], packed[:, 1], written={1}, fresh={1})
    np.testing.assert_array_equal(packed[:, 1], np.arange(32))
    caught("out-of-range", "st.global.u32 [%x1+4], %t; // caught", x[:32], x[16:32], block=16)
    assert "argument 0 and argument 1" in caught("out-of-range", "st.global.u32 [%x1+4], %t; // caught", x[:32], x[16:32], block=16)[0]["text"]


def test_a_part_of_what_is_mapped():
    x, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    gpu = vgpu.Gpu(arch=80)
    module = gpu.module(kernel(COPY, [x, out]))
    with gpu.mapped([("x", x, True, True)]):
        module.launch("k", block=16, args=[x[16:32], out])
        module.launch("k", block=64, args=[x, out])  # all of it is still there
        np.testing.assert_array_equal(out, x)
    with gpu.mapped([("x", x[:32], True, True)]), pytest.raises(ValueError, match="argument 0: a part of this array is mapped already"):
        module.launch("k", block=16, args=[x[16:48], out])


X, OUT = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
REFUSED = {  # what differs from a launch that is right, or a function; the error and its text
    "few": (dict(args=[X]), ValueError, "takes 2 arguments, got 1"),
    "many": (dict(args=[X, OUT, X]), ValueError, "takes 2 arguments, got 3"),
    "objects": (dict(args=[X, np.array([{}])]), ValueError, "argument 1: expected plain numbers .* got object"),
    "big_endian": (dict(args=[X.astype(">u4"), OUT]), ValueError, "argument 0: expected plain numbers .* got >u4"),
    "an_object": (dict(args=[X, object()]), ValueError, "argument 1: expected an array, a number, a tensor map or None, got <object"),
    "text": (dict(args=[X, "ab"]), ValueError, "argument 1: expected an array, a number, a tensor map or None, got 'ab'"),
    "written": (dict(written=0), ValueError, "written and fresh: expected sets of indices, got 0"),
    "fresh": (dict(fresh=1), ValueError, "written and fresh: expected sets of indices"),
    "grid": (dict(grid=1.9), ValueError, "grid: expected an integer from 0 to 4294967295, got 1.9"),
    "grid_of_four": (dict(grid=(1, 1, 1, 1)), ValueError, "grid: expected one to three dimensions"),
    "block": (dict(block="32"), ValueError, "block: expected an integer"),
    "block_z": (dict(block=(1, 1, 65)), vgpu.LaunchError, "a block of 1 x 1 x 65 threads: expected 1 to 1024 in all, and 64 in z at most"),
    "block_beyond_64_bits": (dict(block=(3126356144, 3687748457, 8)), vgpu.LaunchError, "a block of 3126356144 x 3687748457 x 8 threads"),  # modulo 2^64
    "cluster": (dict(cluster=(-1,)), ValueError, "cluster: expected an integer"),
    "shared": (dict(shared=-16), ValueError, "shared: expected an integer"),
    "no_shared": (dict(shared=None), ValueError, "shared: expected an integer .* got None"),
    "much_shared": (dict(shared=2**62), vgpu.LaunchError, "bytes of dynamic shared memory"),
    "unknown_kernel": (dict(kernel="other"), vgpu.LaunchError, "expected the name of one kernel, got 'other'"),
    "no_kernel": (dict(kernel=""), vgpu.LaunchError, "expected the name of one kernel, got ''"),
    "seed": (lambda: vgpu.Gpu(seed=1.5).start(), ValueError, "seed: expected an integer .* got 1.5"),
    "large_seed": (lambda: vgpu.Gpu(seed=2**64 + 1).start(), ValueError, "seed: expected an integer"),
    "map_of_nothing": (lambda: vgpu.TensorMap(None, (1,)), ValueError, "a tensor map: expected an array of one of"),
    "map_of_a_number": (lambda: vgpu.TensorMap(np.uint16(1), ()), ValueError, "a tensor map: expected an array"),
    "map_of_doubles": (lambda: vgpu.TensorMap(np.zeros((8, 8)), (8, 8)), ValueError, "a tensor map: expected an array .* got dtype..float64"),
    "box": (lambda: vgpu.TensorMap(np.zeros((8, 8), np.uint16), (8,)), ValueError, "box: expected 2 dimensions, got"),
    "no_box": (lambda: vgpu.TensorMap(np.zeros((8, 8), np.uint16), None), ValueError, "box: expected 2 dimensions, got None"),
    "box_of_none": (lambda: vgpu.TensorMap(np.zeros((8, 8), np.uint16), (8, None)), ValueError, "box: expected an integer .* got None"),
    "big_endian_map": (lambda: vgpu.TensorMap(np.zeros((8, 8), ">u2"), (8, 8)), ValueError, "expected an array .* got dtype..>u2"),
    "swizzle": (lambda: vgpu.TensorMap(np.zeros((8, 8), np.uint16), (8, 8), 16), ValueError, "swizzle: expected 0, 32, 64 or 128, got 16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    changed, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        if callable(changed):
            changed()
        else:
            launch = dict(kernel="k", args=[X, OUT], block=32) | changed
            vgpu.Gpu(arch=90).module(kernel(COPY, [X, OUT], arch=90)).launch(**launch)
    assert not OUT.any()


def test_required_threads():
    module = vgpu.Gpu(arch=80).module(kernel(COPY, [X, OUT], directives=".reqntid 32"))
    out = np.zeros(32, np.uint32)
    module.launch("k", block=32, args=[X, out])
    np.testing.assert_array_equal(out, X)
    with pytest.raises(vgpu.LaunchError, match="a block of 16 threads, the kernel requires 32"):
        module.launch("k", block=16, args=[X, out])


def test_a_kernel_without_a_body():
    """One for a newer architecture alone does nothing on this one, in silence on hardware; one that loops for ever is another matter."""
    empty = vgpu.Gpu(arch=80).module(vgpu.compile("kernels_forms.cu", "80"))
    with pytest.raises(vgpu.Failure, match="empty-kernel in only_sm90 .*no body for sm_80"):
        empty.launch("only_sm90", args=[np.zeros(32, np.int32)])
    out = np.zeros(32, np.int32)
    vgpu.Gpu(arch=90).module(vgpu.compile("kernels_forms.cu", "90")).launch("only_sm90", args=[out])
    assert out.all()
    endless = ".version 8.7\n.target sm_80\n.address_size 64\n.visible .entry k() {\nself: bra self;\n}"
    with pytest.raises(vgpu.Failure) as failure:
        vgpu.Gpu(arch=80, instruction_limit=10**5).module(endless).launch("k")
    assert [r["kind"] for r in failure.value.reports] == ["instruction-limit"]


def test_without_nvcc_it_is_skipped_with_the_reason():
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", f"{__file__}::test_required_threads"],
                          capture_output=True, text=True, env={"PATH": "/nonexistent", "PYTHONPATH": ":".join(sys.path)}, cwd=vgpu.ROOT)
    assert "1 skipped" in done.stdout and "no nvcc was found" in done.stdout, done.stdout + done.stderr


def test_a_block_has_64_mbarriers():
    init = "mbarrier.init.shared.b64 [%smem+{}], 1;"
    run("\n".join(init.format(8 * i) for i in range(64)), block=1, arch=90, memory=520)
    caught("uncovered", "\n".join(init.format(8 * i) + (" // caught" if i == 64 else "") for i in range(65)), block=1, arch=90, memory=520)


def test_prefetches_and_clocks():
    """Neither changes a result: prefetches, of bulk copies too, do nothing; clocks only go on."""
    out = np.zeros(64, np.uint32)
    run("""prefetch.global.L2 [%x0]; prefetchu.L1 [%x0]; cp.async.bulk.prefetch.L2.global [%a0], 256;
mov.u64 %l1, %clock64; mov.u64 %l2, %clock64; setp.le.u64 %p1, %l1, %l2;
mov.u32 %r1, %clock; mov.u32 %r2, %clock; setp.le.and.u32 %p1, %r1, %r2, %p1;
mov.u64 %l1, %globaltimer; mov.u64 %l2, %globaltimer; setp.le.and.u64 %p1, %l1, %l2, %p1;
selp.u32 %r3, 1, 0, %p1; st.global.u32 [%x0], %r3;""", out, block=64, arch=90)
    assert out.all()
    run("cp.async.bulk.prefetch.tensor.2d.L2.global [map, {%t, 0}]; st.global.u32 [out], 7;", out, vgpu.TensorMap(np.zeros((64, 64), np.uint16), (8, 8)),
        names="out map", block=1, arch=90)
    assert out[0] == 7
