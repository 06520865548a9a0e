"""Tensor maps of the virtual GPU: the limits of cuTensorMapEncodeTiled (CUDA driver API 6.30), where a map may lie, and copies that
a map does not fit."""
import ctypes

import numpy as np
import pytest

import vgpu
from raw_ptx import aligned
from test_bulk_copy import LOAD, STORE, TENSOR_LOAD, TENSOR_STORE, make_tensor, swizzle_bytes


def test_maps_that_do_not_fit():
    tensor, out = make_tensor((40, 64), np.uint16), np.zeros(2048, np.uint8)
    longer = np.lib.stride_tricks.as_strided(tensor, (48, 64), tensor.strides)

    def run(made, row=0, written=(1,), device=tensor):
        def launch(kernel, seed):
            with vgpu.Gpu().mapped([("tensor", device, 0 in written, True)]):
                kernel.run(made, out, np.int32(row), np.int32(0), seed=seed, block=64, written=written)
        return launch

    LOAD.caught(run(vgpu.TensorMap(tensor.reshape(5, 8, 64), (1, 16, 64), 128)), "descriptor", TENSOR_LOAD,
                "3 dimensions in a copy of 2")
    LOAD.caught(run(vgpu.TensorMap(tensor, (32, 64), 128)), "out-of-range", TENSOR_LOAD,
                "a box of 4096 bytes, more than there is of shared memory")
    beyond = aligned(128, np.uint8)  # the map in global memory: as an argument its array would be mapped
    beyond[:] = vgpu.encode(vgpu.library().c.vgpu_encode_tiled, vgpu.TensorMap(longer, (16, 64), 128), tensor.ctypes.data)
    LOAD.caught(run(beyond, row=30), "out-of-range", TENSOR_LOAD, "behind the 5120 bytes of tensor")
    STORE.caught(run(vgpu.TensorMap(tensor, (16, 64), 128), written=()), "read-only", TENSOR_STORE, "which is an input")


# A kernel parameter copied to local memory.
IN_LOCAL = LOAD.edit("bar.sync 0;", """{ .reg .b64 from, to64, v; .reg .b32 n; .reg .pred more; mov.b64 from, q0; mov.u32 n, 16;
mov.u64 to64, copied; cvta.local.u64 to64, to64;
MOVE: ld.param.u64 v, [from]; st.u64 [to64], v; add.u64 from, from, 8; add.u64 to64, to64, 8; sub.u32 n, n, 1;
setp.ne.u32 more, n, 0; @more bra MOVE;
mov.u64 m, copied; cvta.local.u64 m, m; }
bar.sync 0;""", variables=".local .align 128 .b8 copied[128];")


def test_where_a_map_lies():
    tensor, out = make_tensor((40, 64), np.uint16), np.zeros(2048, np.uint8)
    encoded, changed, numbers = (aligned(128, np.uint8) for _ in range(3))  # the 128 bytes of a map in global memory, or others
    encoded[:] = vgpu.encode(vgpu.library().c.vgpu_encode_tiled, vgpu.TensorMap(tensor, (16, 64), 128), tensor.ctypes.data)
    changed[:], numbers[:] = encoded ^ (np.arange(128) == 20), np.arange(128)

    def run(made):
        def launch(kernel, seed):
            with vgpu.Gpu().mapped([("tensor", tensor, False, True)]):
                kernel.run(made, out, np.int32(3), np.int32(0), seed=seed, block=64, written=(1,))
        return launch

    run(encoded)(LOAD, 0)
    np.testing.assert_array_equal(out, swizzle_bytes(tensor[3:19].view(np.uint8).reshape(-1), 128))
    LOAD.caught(run(changed), "descriptor", TENSOR_LOAD, "are not a tensor map")
    LOAD.caught(run(numbers), "descriptor", TENSOR_LOAD, "are not a tensor map")
    IN_LOCAL.caught(run(vgpu.TensorMap(tensor, (16, 64), 128)), "descriptor", TENSOR_LOAD, "must be __grid_constant__")


# ---------------------------------------------------------------------------------------------------- limits of a tensor map

BF16, FLOAT32, UINT8 = 9, 7, 0
GOOD = dict(map=0, type=BF16, rank=2, address=0, dim=(64, 40), strides=(128,), box=(64, 16), steps=(1, 1), interleave=0,
            swizzle=3, l2=0, fill=0)


def encode(**changed):
    a = GOOD | changed
    memory, storage = aligned(256, np.uint8), aligned(64, np.uint8)
    array = lambda kind, values: (kind * len(values))(*values)  # noqa: E731
    address = None if a["address"] is None else storage.ctypes.data + a["address"]
    status = vgpu.library().c.vgpu_encode_tiled(
        memory.ctypes.data + a["map"], a["type"], a["rank"], address,
        array(ctypes.c_uint64, a["dim"]), array(ctypes.c_uint64, a["strides"] or (0,)), array(ctypes.c_uint32, a["box"]),
        array(ctypes.c_uint32, a["steps"]), a["interleave"], a["swizzle"], a["l2"], a["fill"])
    assert memory.any() == (status == 0), "a refused map is not written"
    return status == 0


def deep(rank, **more):
    return dict(rank=rank, dim=(64,) * rank, strides=(128,) * (rank - 1), box=(8,) + (1,) * (rank - 1), steps=(1,) * rank,
                swizzle=0) | more


LIMITS = [  # fits, does not
    (dict(map=64), dict(map=32)), (dict(address=16), dict(address=8)), (dict(), dict(address=None)),
    (deep(1), deep(0)), (deep(5), deep(6)),
    (dict(dim=(1 << 32, 40)), dict(dim=((1 << 32) + 1, 40))), (dict(dim=(1, 1)), dict(dim=(64, 0))),
    (dict(strides=(144,)), dict(strides=(136,))), (dict(strides=((1 << 40) - 16,)), dict(strides=(1 << 40,))),
    (dict(box=(64, 256)), dict(box=(64, 257))), (dict(box=(64, 1)), dict(box=(64, 0))),
    (dict(box=(8, 16), swizzle=0), dict(box=(4, 16), swizzle=0)),
    (dict(box=(12, 16), type=FLOAT32, swizzle=0), dict(box=(10, 16), type=FLOAT32, swizzle=0)),
    (dict(box=(16, 16), swizzle=1), dict(box=(32, 16), swizzle=1)), (dict(box=(32, 16), swizzle=2), dict(box=(64, 16), swizzle=2)),
    (dict(box=(64, 16), swizzle=3), dict(box=(128, 16), swizzle=3)), (dict(box=(128, 16), swizzle=0), dict(swizzle=7)),
    (dict(), dict(swizzle=-1)), (dict(type=UINT8), dict(type=-1)), (dict(type=12, box=(32, 16)), dict(type=16)),
    (dict(box=(32, 16), swizzle=3), dict(box=(72, 16), swizzle=3)), (dict(box=(8, 16), swizzle=1), dict(box=(24, 16), swizzle=1)),
    (dict(steps=(8, 1)), dict(steps=(9, 1))), (dict(), dict(steps=(0, 1))), (dict(), dict(steps=(1, 9))), (dict(), dict(steps=(1, 0))),
    (dict(l2=3), dict(l2=4)), (dict(), dict(l2=-1)), (dict(), dict(interleave=3)), (dict(), dict(fill=2)),
    # Strides of permuted tensors fall, and each is subject to the limits.
    (deep(3, strides=(4096, 128)), deep(3, strides=(4096, 136))), (deep(3, strides=(128, 4096)), deep(3, strides=(136, 4096))),
    (deep(3, dim=(64, 1000, 8), strides=(1024, 128)), deep(3, strides=(1024, 1 << 40)))]


@pytest.mark.parametrize("fits, breaks", LIMITS)
def test_limits_of_a_tensor_map(fits, breaks):
    assert encode(**fits) and not encode(**breaks)


def test_what_a_tensor_map_does_not_cover():
    """Legal, and refused all the same rather than wrong."""
    assert not encode(fill=1) and not encode(steps=(1, 2)) and not encode(interleave=1, **deep(3)) and not encode(swizzle=4)
    assert not any(encode(type=packed, dim=(128, 40), box=(128, 16), swizzle=0) for packed in (13, 14, 15))
    tensor, out = make_tensor((40, 64), np.uint16), np.zeros(2048, np.uint8)
    for swizzle, box in (128, (16, 32)), (64, (16, 16)), (32, (16, 8)):  # rows of half the swizzle
        for kernel, at in (LOAD, TENSOR_LOAD), (STORE, TENSOR_STORE):
            args = [vgpu.TensorMap(tensor, box, swizzle), out, np.int32(0), np.int32(0)]
            kernel.caught(lambda k, seed: k.run(*args, seed=seed, block=64), "uncovered", at,  # noqa: B023
                          f"rows of {swizzle // 2} bytes, narrower than its swizzle")
