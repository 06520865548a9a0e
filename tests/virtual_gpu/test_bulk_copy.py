"""Bulk and tensor copies of the virtual GPU (PTX ISA 9.7.9.25.4 to 9.7.9.25.6): layouts against numpy, and what must happen
around a copy."""
import numpy as np
import pytest

import vgpu
from raw_ptx import Kernel, aligned, only, wait

MODES = pytest.mark.parametrize("seed, random_completion", [(0, False), (1, True), (2, False), (3, True)])


def swizzle_bytes(data, swizzle):
    """Bytes as they lie from an address that is a multiple of 1024: 16-byte units of a 128-, 64- or 32-byte swizzle have their
    address bits 4.. xored with bits 7.. (three, two or one of them; PTX ISA 5.5.7)."""
    offset = np.arange(data.size)
    out = np.zeros_like(data)
    out[offset ^ (offset >> 7 & (swizzle // 16 - 1) if swizzle else 0 * offset) << 4] = data
    return out


def box_of(tensor, box, origin):
    """The box at an origin (outermost first), zeros outside the tensor, and which of its elements are inside."""
    at = [np.arange(o, o + n) for o, n in zip(origin, box)]
    inside = np.ones(box, bool)
    for axis, (i, n) in enumerate(zip(at, tensor.shape)):
        inside &= ((0 <= i) & (i < n)).reshape([-1 if a == axis else 1 for a in range(tensor.ndim)])
    values = tensor[np.ix_(*[np.clip(i, 0, n - 1) for i, n in zip(at, tensor.shape)])]
    return np.where(inside, values, 0).astype(tensor.dtype), inside


def each_word(count, body):
    """`body` for i in range(count) by 64 threads, the word's shared address in a, its byte offset in o."""
    return (f"{{ .reg .b32 i, a, v; .reg .b64 o; .reg .pred more; mov.u32 i, %t;\n"
            f"COPY: setp.ge.u32 more, i, {count}; @more bra DONE; mad.lo.u32 a, i, 4, %smem; mul.wide.u32 o, i, 4;\n{body}\n"
            f"add.u32 i, i, 64; bra COPY; DONE: }}")


DUMP = "ld.shared.u32 v, [a];\nadd.u64 o, o, out; st.global.u32 [o], v;"
FILL = "add.u64 o, o, x; ld.global.u32 v, [o];\nst.shared.u32 [a], v;"
INIT = "mbarrier.init.shared::cta.b64 [bar], 1;"
INIT_FENCE = "fence.mbarrier_init.release.cluster;"


def coordinates(rank):
    """Their names, innermost first."""
    return [f"x{i}" for i in range(rank)]


def load_kernel(rank, nbytes):
    return Kernel(" ".join(["m out", *coordinates(rank)[::-1]]), f"""
.reg .b32 bar, to; add.u32 bar, %smem, {nbytes}; mov.u32 to, %smem;
{only("%t eq 0", f"{INIT}{chr(10)}{INIT_FENCE}")}
bar.sync 0;
{only("%t eq 0", f'''mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {nbytes};
cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes [to], [m, {{{', '.join(coordinates(rank))}}}], [bar];''')}
{wait("bar", "0")}
{each_word(nbytes // 4, DUMP)}
""", memory=nbytes + 16)


def store_kernel(rank, nbytes):
    return Kernel(" ".join(["m x", *coordinates(rank)[::-1]]), f"""
{each_word(nbytes // 4, FILL)}
fence.proxy.async.shared::cta;
bar.sync 0;
{only("%t eq 0", f'''cp.async.bulk.tensor.{rank}d.global.shared::cta.bulk_group [m, {{{', '.join(coordinates(rank))}}}], [%smem];
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;''')}
""", memory=nbytes)


def run_load(kernel, seed=0, random_completion=False, tensor=None, box=(16, 64), origin=(3, 0), swizzle=128, **more):
    tensor = make_tensor((40, 64), np.uint16) if tensor is None else tensor
    wanted, _ = box_of(tensor, box, origin)
    out = np.zeros(wanted.nbytes, np.uint8)
    kernel.run(vgpu.TensorMap(tensor, box, swizzle), out, *map(np.int32, origin), seed=seed, random_completion=random_completion, block=64,
               written={1}, **more)
    np.testing.assert_array_equal(out, swizzle_bytes(wanted.view(np.uint8).reshape(-1), swizzle))


def run_store(kernel, seed=0, random_completion=False, tensor=None, box=(16, 64), origin=(3, 0), swizzle=128, **more):
    tensor = make_tensor((40, 64), np.uint16) if tensor is None else tensor
    inner = np.random.default_rng(seed + 1).integers(1, 255, box).astype(tensor.dtype)
    wanted, (_, inside) = tensor.copy(), box_of(tensor, box, origin)
    slices = tuple(slice(o, o + n) for o, n in zip(origin, box))
    wanted[slices] = inner[inside].reshape(wanted[slices].shape)
    x = swizzle_bytes(inner.view(np.uint8).reshape(-1), swizzle)
    kernel.run(vgpu.TensorMap(tensor, box, swizzle), x, *map(np.int32, origin), seed=seed, random_completion=random_completion, block=64,
               written={0}, **more)
    np.testing.assert_array_equal(tensor, wanted)
    assert inside.any() == (wanted[slices].size > 0)


def make_tensor(shape, dtype, pad=0):
    """Values without zeros, on 16 bytes; `pad` more elements a row."""
    n = int(np.prod(shape[:-1])) * (shape[-1] + pad)
    itemsize = np.dtype(dtype).itemsize
    raw = np.zeros(n * itemsize + 16, np.uint8)
    raw = raw[-raw.ctypes.data % 16:][:n * itemsize].view(dtype)
    raw[:] = np.random.default_rng(n).integers(1, 255, n)
    return raw.reshape(*shape[:-1], shape[-1] + pad)[..., :shape[-1]]


SHAPES = [  # tensor, box, dtype, padding of a row; a row of the box is 32, 64 or 128 bytes for that swizzle
    ((100,), (48,), np.uint8, 12), ((90,), (32,), np.uint16, 6),
    ((40, 64), (16, 64), np.uint16, 0), ((33, 72), (24, 32), np.uint16, 8), ((20, 30), (8, 8), np.int32, 2),
    ((70, 40), (64, 32), np.uint8, 8),
    ((5, 9, 64), (3, 8, 64), np.uint16, 0), ((4, 12, 20), (2, 8, 16), np.uint16, 4),
    ((2, 3, 4, 16), (2, 2, 3, 16), np.uint16, 0), ((2, 3, 2, 4, 16), (1, 2, 2, 3, 16), np.uint16, 0)]


def origins(shape, box, itemsize):
    """Inside, over each edge (below 0 too, for loads alone), and wholly outside. Rows of the box begin at multiples of 16 bytes."""
    zeros, unit = (0,) * (len(shape) - 1), 16 // itemsize
    for *outer, inner in [[(s - b) // 2 for s, b in zip(shape, box)], [-(b // 2) for b in box], [s - b // 2 for s, b in zip(shape, box)],
                          [*zeros, shape[-1] + unit - 1], [-box[0], *zeros], [shape[0] + unit - 1, *zeros]]:
        yield *outer, inner // unit * unit


CASES = [(shape, box, dtype, pad, swizzle) for shape, box, dtype, pad in SHAPES for swizzle in (0, 32, 64, 128)
         if not swizzle or box[-1] * np.dtype(dtype).itemsize == swizzle]


@pytest.mark.on_silicon
@pytest.mark.parametrize("direction", ["load", "store"])
@pytest.mark.parametrize("shape, box, dtype, pad, swizzle", CASES,
                         ids=[f"{s}-{b}-{np.dtype(d).name}-{w}" for s, b, d, _, w in CASES])
def test_boxes(shape, box, dtype, pad, swizzle, direction):
    tensor = make_tensor(shape, dtype, pad)
    make, run = (load_kernel, run_load) if direction == "load" else (store_kernel, run_store)
    kernel = make(len(shape), int(np.prod(box)) * tensor.itemsize)
    for i, origin in enumerate(origins(shape, box, tensor.itemsize)):
        ragged = shape[-1] * tensor.itemsize % 16 and 0 <= shape[-1] - origin[-1] < box[-1]
        if direction == "store" and (ragged or min(origin) < 0):
            continue  # refused: test_a_store_over_a_ragged_end, test_misuse
        run(kernel, i, i % 2 == 1, tensor=tensor, box=box, origin=origin, swizzle=swizzle)


@pytest.mark.on_silicon
@pytest.mark.parametrize("direction", ["load", "store"])
def test_a_permuted_tensor(direction):
    """Heads outermost of [tokens, heads, 64]: the stride of a head is less than that of a token."""
    make, run = (load_kernel, run_load) if direction == "load" else (store_kernel, run_store)
    for origin in (1, 3, 0), (4, 30, 0):
        tensor = make_tensor((40, 5, 64), np.uint16).transpose(1, 0, 2)
        run(make(3, 4096), 0, tensor=tensor, box=(2, 16, 64), origin=origin, swizzle=128)


def test_a_store_over_a_ragged_end():
    """Hardware writes whole 16 bytes: beyond a row whose bytes are not a multiple of them, but not where the box lies outside."""
    tensor = make_tensor((40, 60), np.uint16, 4)
    STORE.caught(lambda k, seed: run_store(k, seed, tensor=tensor), "out-of-range", TENSOR_STORE, "beyond rows of 120 bytes, up to")
    for box, origin, swizzle in ((16, 64), (40, 0), 128), ((16, 64), (0, 64), 128), ((32, 32), (0, 16), 64):
        run_store(STORE, tensor=tensor, box=box, origin=origin, swizzle=swizzle)
    run_load(LOAD, tensor=tensor)


def test_swizzles_differ():
    """The reference is no identity, and each mode has its own."""
    data = np.arange(2048, dtype=np.uint16).view(np.uint8)
    images = [bytes(swizzle_bytes(data, s)) for s in (0, 32, 64, 128)]
    assert len(set(images)) == 4 and images[0] == bytes(data)
    assert all(sorted(i) == sorted(data) for i in images)


# ------------------------------------------------------------------------------------------------------------- without a tensor

BULK_LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [to], [x], bytes, [bar];"
BULK_STORE = "cp.async.bulk.global.shared::cta.bulk_group [out], [to], bytes;"
FENCE = "fence.proxy.async.shared::cta;"
# Each half of the block's 64 threads has a buffer and an mbarrier: loads, adds 1 to each word, and stores.
BULK = Kernel("x out bytes", f"""
.reg .b32 to, bar, half, i, a, v; .reg .b64 o; .reg .pred p, lead;
shr.u32 half, %t, 5; mad.lo.u32 to, half, 512, %smem; mad.lo.u32 bar, half, 8, %smem; add.u32 bar, bar, 1024;
setp.eq.u32 lead, %lane, 0;
mul.lo.u32 i, half, bytes; cvt.u64.u32 o, i; add.u64 x, x, o; add.u64 out, out, o;
@lead {INIT}
{FENCE}
bar.warp.sync -1;
@lead mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], bytes;
@lead {BULK_LOAD}
{wait("bar", "0")}
mul.lo.u32 i, %lane, 4;
EACH: add.u32 a, to, i; ld.shared.u32 v, [a]; add.u32 v, v, 1;
st.shared.u32 [a], v;
add.u32 i, i, 128; setp.lt.u32 p, i, bytes; @p bra EACH;
{FENCE} // before the store
bar.warp.sync -1; @!lead bra END;
{BULK_STORE}
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
END:
""", memory=1024 + 16)


def run_bulk(kernel, seed=0, random_completion=False, nbytes=384, **more):
    x, out = aligned(nbytes // 2, np.uint32), aligned(nbytes // 2, np.uint32)
    x[:] = np.random.default_rng(seed).integers(0, 2**32, x.size, dtype=np.uint32)
    kernel.run(x, out, np.uint32(nbytes), seed=seed, random_completion=random_completion, block=64, written={1}, **more)
    np.testing.assert_array_equal(out, x + np.uint32(1))


@pytest.mark.on_silicon
@MODES
@pytest.mark.parametrize("nbytes", [128, 384, 512])
def test_bulk(nbytes, seed, random_completion):
    run_bulk(BULK, seed, random_completion, nbytes)


# -------------------------------------------------------------------------------------------------------------------- reports

LOAD, STORE = load_kernel(2, 2048), store_kernel(2, 2048)
TENSOR_LOAD, TENSOR_STORE = "[m, {x0, x1}], [bar];", "[m, {x0, x1}], [%smem];"
COMMIT, WAIT = "cp.async.bulk.commit_group;", "cp.async.bulk.wait_group 0;"
LOAD_BUGS = [  # name, edits, kind, where, text, in how many of 8 schedules at least
    ("read before the wait", (wait("bar", "0"), ""), "in-flight|race", "ld.shared.u32 v, [a]",
     "which the copy at k.cu:10 has not finished|no barrier between", 4),
    ("no fence after init", (INIT_FENCE, ""), "proxy", TENSOR_LOAD, "initialised without fence.mbarrier_init"),
    ("fence before init", (f"{INIT}\n{INIT_FENCE}", f"{INIT_FENCE}\n{INIT}"), "proxy", TENSOR_LOAD,
     "initialised without fence.mbarrier_init"),
    ("another fence", (INIT_FENCE, "fence.acq_rel.cta;"), "proxy", TENSOR_LOAD, "initialised without fence.mbarrier_init"),
    ("too many bytes expected", ("_, [bar], 2048;", "_, [bar], 2064;"), "deadlock", "[bar], 0;",
     "mbarrier at shared address 2048 of block 0: phase 0 lacks 0 of 1 arrivals and 16 bytes"),
    ("too few bytes expected", ("_, [bar], 2048;", "_, [bar], 1024;"), "deadlock", "[bar], 0;", "and -1024 bytes"),
    ("no mbarrier", (INIT, "st.shared.u64 [bar], 0;"), "mbarrier", "_, [bar], 2048;",
     "no initialised mbarrier at shared address 2048", 2),
    ("unaligned destination", ("mov.u32 to, %smem;", "add.u32 to, %smem, 64;"), "misaligned", TENSOR_LOAD, "not a multiple of 128"),
    ("a coordinate off 16 bytes", ("mov.u32 to, %smem;", "mov.u32 to, %smem; sub.u32 x0, x0, 4;"), "misaligned", TENSOR_LOAD,
     "from byte -8 of the rows"),
    ("beyond shared memory", ("mov.u32 to, %smem;", "add.u32 to, %smem, 256;"), "out-of-range", TENSOR_LOAD, "behind the 2064 bytes of"),
    ("before shared memory", ("mov.u32 to, %smem;", "mov.u32 to, 0;"), "out-of-range", TENSOR_LOAD, "1024 bytes before"),
    ("an undefined coordinate", ("{x0, x1}", "{x0, bar2}", ".reg .b32 bar, to;", ".reg .b32 bar, to, bar2;"), "uninitialised",
     "[m, {x0, bar2}]", "operands of a copy"),
    ("written in flight", (TENSOR_LOAD, TENSOR_LOAD + " st.shared.u32 [to+64], bar;"), "in-flight", "[to+64], bar",
     "writes shared byte 64, which the copy"),
    ("nobody waits", (wait("bar", "0"), "ret;"), "in-flight", TENSOR_LOAD, "the block ends while this copy still writes"),
]
STORE_BUGS = [
    ("no proxy fence", (FENCE, ""), "proxy", TENSOR_STORE, "ordinary store, without fence.proxy.async"),
    ("fence of one thread only", (FENCE, f".reg .pred p; setp.eq.u32 p, %t, 0; @p {FENCE}"), "proxy", TENSOR_STORE,
     "ordinary store"),
    ("fence of global memory", (FENCE, "fence.proxy.async.global;"), "proxy", TENSOR_STORE, "ordinary store, without fence.proxy.async"),
    ("fence of an mbarrier", (FENCE, "fence.mbarrier_init.release.cluster;"), "proxy", TENSOR_STORE, "ordinary store"),
    ("a coordinate off 16 bytes", (FENCE, f"{FENCE} add.u32 x0, x0, 12;"), "misaligned", TENSOR_STORE, "from byte 24 of the rows"),
    ("a column below 0", (FENCE, f"{FENCE} sub.u32 x0, x0, 8;"), "out-of-range", TENSOR_STORE, "writes at coordinate -8, and stores"),
    ("a row below 0", (FENCE, f"{FENCE} sub.u32 x1, x1, 4;"), "out-of-range", TENSOR_STORE, "writes at coordinate -1, and stores"),
    ("no barrier", ("bar.sync 0;", ""), "race", TENSOR_STORE, "wrote: no (barrier|__syncwarp) between"),
    ("the block ends", (WAIT, "", COMMIT, ""), "in-flight", TENSOR_STORE, "the block ends while this copy still reads"),
    ("reused before it is read", (WAIT, "st.shared.u32 [%smem+64], %t;"), "in-flight", "[%smem+64], %t",
     "writes shared byte 64, which the copy at k.cu:\\d+ has not finished"),
    ("waits for groups but one", (WAIT, "cp.async.bulk.wait_group.read 1; st.shared.u32 [%smem+64], %t;"), "in-flight",
     "[%smem+64], %t", "writes shared byte 64"),
    ("waits before the commit", (COMMIT + "\n" + WAIT, WAIT + COMMIT + "\nst.shared.u32 [%smem+64], %t;"), "in-flight",
     "[%smem+64], %t", "writes shared byte 64"),
    ("not all was written", ("COPY: setp.ge.u32 more, i, 512;", "COPY: setp.ge.u32 more, i, 511;"), "uninitialised", TENSOR_STORE,
     "was never written"),
]
BULK_BUGS = [
    ("no proxy fence", (FENCE + " // before the store", ""), "proxy", BULK_STORE, "ordinary store"),
    ("read before the wait", (wait("bar", "0"), ""), "in-flight|race", "ld.shared.u32 v, [a]", "", 4),
    ("an odd size", (BULK_LOAD, "sub.u32 bytes, bytes, 8;\n@lead " + BULK_LOAD), "misaligned", BULK_LOAD, "multiples of 16"),
    ("an unaligned source", (BULK_LOAD, "add.u64 x, x, 8;\n@lead " + BULK_LOAD), "misaligned", BULK_LOAD, "multiples of 16"),
    ("beyond the input", (BULK_LOAD, "add.u64 x, x, 512;\n@lead " + BULK_LOAD), "out-of-range", BULK_LOAD,
     "behind the \\d+ bytes of argument 0"),
    ("beyond shared memory", (BULK_STORE, "add.u32 to, to, 16384;\n" + BULK_STORE), "out-of-range", BULK_STORE,
     "reads \\d+ bytes of shared memory, ending 1\\d{4} bytes behind the 1040 bytes"),
    ("just before shared memory", (BULK_STORE, "sub.u32 to, %smem, bytes;\n" + BULK_STORE), "out-of-range", BULK_STORE, "bytes before memory"),
    ("a reduction", (BULK_STORE, "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [out], [to], bytes;"), "uncovered",
     "cp.reduce", ""),
    ("output read too early", (WAIT, "cp.async.bulk.wait_group.read 0;\nld.global.u32 v, [out+4];"), "in-flight",
     "ld.global.u32 v, [out+4]", "reads byte \\d+ of argument 1"),
    ("loaded twice", (BULK_LOAD, BULK_LOAD + " // first\n@lead " + BULK_LOAD + " // again"), "in-flight|race", "// again",
     "which the copy at|no barrier between", 4),
]


def cases(*tables):
    return pytest.mark.parametrize("kernel, run, bug", [(k, run, bug) for k, run, bugs in tables for bug in bugs],
                                   ids=[f"{run.__name__[4:]}: {bug[0]}" for _, run, bugs in tables for bug in bugs])


def test_undefined_sources():
    """What is copied is as undefined as its source."""
    for kernel, run, at in (LOAD, run_load, "st.global.u32 [o], v"), (BULK, run_bulk, BULK_STORE):
        kernel.caught(lambda k, seed: run(k, seed, seed == 1, fresh={0}), "uninitialised", at, "reaches global memory")  # noqa: B023


@cases((LOAD, run_load, LOAD_BUGS), (STORE, run_store, STORE_BUGS), (BULK, run_bulk, BULK_BUGS))
def test_misuse(kernel, run, bug):
    run(kernel)
    kernel.edit(*bug[1]).caught(run, *bug[2:])
