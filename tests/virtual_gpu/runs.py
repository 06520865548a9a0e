"""The kernels of kernels_sm80.cu and kernels_sm90.cu with their inputs and independent results: one list for the virtual GPU
and an NVIDIA GPU (test_kernels.py), and the mutations of these kernels (test_mutations.py)."""
import numpy as np

import vgpu
from c_api import to_bf16, to_f32

SM80, SM90 = "kernels_sm80.cu", "kernels_sm90.cu"


def exact(x):
    return to_f32(x).astype(np.float64)


def normal(rng, *shape):
    return to_bf16(rng.standard_normal(shape))


def close(value, wanted, k):
    """Within what f32 sums of k products of bf16 normal numbers may differ, and one rounding if `value` is bf16."""
    scale = np.sqrt(k)
    rounding = 2**-8 * np.abs(wanted) if value.dtype == np.uint16 else 0
    np.testing.assert_array_less(np.abs(exact(value) - wanted), k * 2**-23 * scale + rounding + 1e-30)


def gemm_sm80(module, kernel, m=100, n=72, k=136):
    rng = np.random.default_rng(0)
    a, b, c = normal(rng, m, k), normal(rng, n, k), np.full((m, n), np.nan, np.float32)
    module.launch(kernel, grid=(-(-n // 64), -(-m // 64)), block=128, args=[a, b, c, np.int32(m), np.int32(n), np.int32(k)], written={2}, fresh={2})
    close(c, exact(a) @ exact(b).T, k)


def attention_sm80(module, kernel, n=256):
    rng = np.random.default_rng(1)
    q, k, v = (normal(rng, n, 64) for _ in range(3))
    out = np.full((n, 64), np.nan, np.float32)
    module.launch(kernel, grid=n // 64, block=128, args=[q, k, v, out, np.float32(0.125)], written={3}, fresh={3})
    scores = np.where(np.tri(n, dtype=bool), exact(q) @ exact(k).T / 8, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    wanted = weights / weights.sum(1, keepdims=True) @ exact(v)
    assert np.linalg.norm(out - wanted) < 2**-8 * np.linalg.norm(wanted)  # the weights are rounded to bf16


def ticket_sum(module, kernel, blocks=20, n=3000):
    x = np.random.default_rng(2).standard_normal(n).astype(np.float32)
    parts, ticket, result = np.zeros(blocks, np.float32), np.zeros(1, np.uint32), np.zeros(1, np.float32)
    module.launch(kernel, grid=blocks, block=128, args=[x, parts, ticket, result, np.int32(n)], written={1, 2, 3}, fresh={1, 3})
    assert abs(result[0] - x.astype(np.float64).sum()) < 1e-3


def split_dot(module, kernel, rows=40, columns=64):
    rng = np.random.default_rng(3)
    x, y = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, columns), columns))
    out = np.zeros((2, rows), np.float32)
    module.launch(kernel, grid=2, block=64, args=[x, y, out, np.int32(rows), np.int32(columns)], written={2}, fresh={2})
    np.testing.assert_allclose(out.sum(0), x.astype(np.float64) @ y, atol=1e-4)


def reverse(module, kernel):
    x, out = np.arange(256, dtype=np.int32), np.zeros(256, np.int32)
    module.launch(kernel, grid=1, block=256, args=[x, out, np.int32(256)], written={1}, fresh={1})
    np.testing.assert_array_equal(out, x[::-1])


def gemm_sm90(module, kernel, m=256, n=256, k=192, grid=2, cluster=1, a_rows=128, c_rows=64):
    """a_rows, c_rows: of the boxes of A and C; the kernel expects 128 and 64."""
    rng = np.random.default_rng(4)
    a, b, c = normal(rng, m, k), normal(rng, n, k), np.zeros((m, n), np.uint16)
    maps = [vgpu.TensorMap(x, (rows, 64), 128) for x, rows in ((a, a_rows), (b, 128 // cluster), (c, c_rows))]
    module.launch(kernel, grid=grid, block=384, cluster=(cluster,), shared=3 * 32768 + 32768 + 48,
                  args=[*maps, np.int32(m), np.int32(n), np.int32(k)], written={2}, fresh={2})
    close(c, exact(a) @ exact(b).T, k)


def gemm_cluster(module, kernel):
    gemm_sm90(module, kernel, m=512, n=256, grid=4, cluster=2)


def product(module, kernel):
    rng = np.random.default_rng(5)
    a, b, c = normal(rng, 64, 64), normal(rng, 128, 64), np.full((64, 128), np.nan, np.float32)
    module.launch(kernel, grid=1, block=128, args=[a, b, c], written={2}, fresh={2})
    close(c, exact(a) @ exact(b).T, 64)


def dependent_launch(module, kernel):
    x, y, z = (np.random.default_rng(6 + i).standard_normal(256).astype(np.float32) for i in range(3))
    wanted = z + 2 * x
    with module.gpu.mapped([("x", x, False, True), ("y", y, True, False), ("z", z, True, True)]):
        module.launch("double_values", grid=4, block=64, args=[x, y])
        module.launch(kernel, grid=4, block=64, args=[y, z], programmatic=True)
    np.testing.assert_array_equal(z, wanted)


CORRECT = [  # source, kernel, run
    (SM80, "gemm_sm80", gemm_sm80), (SM80, "attention_sm80", attention_sm80), (SM80, "ticket_sum_correct", ticket_sum),
    (SM80, "split_dot_correct", split_dot), (SM80, "reverse_correct", reverse),
    (SM90, "gemm_sm90", gemm_sm90), (SM90, "gemm_cluster", gemm_cluster), (SM90, "product_correct", product),
    (SM90, "add_values_correct", dependent_launch)]
