"""The substitute CUDA runtime as a launcher uses it (runtime_calls.cu)."""
import numpy as np
import pytest

import vgpu

INVALID_VALUE, INVALID_CONFIGURATION = 1, 9  # cudaError_t


def call(cluster=2, wide=0, allowed=65536, rows=128, arch=90):
    gpu, columns = vgpu.Gpu(arch=arch), 64
    x, out, zeros = np.arange(rows * columns, dtype=np.int32), np.zeros((2 * cluster, rows * columns), np.int32), np.full(64, 7, np.int32)
    gpu.start()
    with gpu.mapped([("x", x, False, True), ("out", out, True, False), ("zeros", zeros, True, False)]):
        status = gpu.lib.c.runtime_calls(*(vgpu.ctypes.c_void_p(a.ctypes.data) for a in (x, out, zeros)), rows, columns, cluster, wide, allowed)
        gpu.finish()
    return status, x, out, zeros


def test_a_launch_with_all_that_it_needs():
    for cluster, wide in (2, 0), (8, 0), (16, 1):
        status, x, out, zeros = call(cluster, wide)
        assert status == 0
        np.testing.assert_array_equal(out, x + np.arange(2 * cluster)[:, None] % cluster)
        np.testing.assert_array_equal(zeros, np.ones(64))


@pytest.mark.parametrize("wrong, status", [
    (dict(cluster=16), 6000 + INVALID_CONFIGURATION),                       # without the attribute for more than 8
    (dict(allowed=16384), 6000 + INVALID_CONFIGURATION),                    # for 32 KiB
    (dict(allowed=232448 + 1), 4000 + INVALID_VALUE), (dict(rows=257), 3000 + INVALID_VALUE),
    (dict(arch=80, allowed=163 * 1024 + 1), 4000 + INVALID_VALUE)])
def test_what_the_runtime_refuses(wrong, status):
    found, _, out, zeros = call(**wrong)
    assert found == status and not out.any() and (zeros == 7).all()
