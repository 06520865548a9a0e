"""The substitute CUDA runtime as a launcher uses it (runtime_calls.cu), and as a program does that calls the library."""
import contextlib
import ctypes
import re
import subprocess

import numpy as np
import pytest

import c_api
import vgpu

INVALID_VALUE, INVALID_CONFIGURATION = 1, 9  # cudaError_t
INVALID_HANDLE, ILLEGAL_STATE, LAUNCH_FAILURE = 400, 401, 719
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, CAPTURE_IMPLICIT = 900, 901, 906
GLOBAL, RELAXED = 0, 2  # cudaStreamCaptureMode
TO_DEVICE, TO_HOST = 1, 2  # cudaMemcpyKind
ANY = ctypes.byref(ctypes.c_uint64())


def cuda(name, *args):
    """A call of the runtime by a program; ints are addresses, sizes, handles or constants."""
    return getattr(vgpu.library().c, name)(*(ctypes.c_uint64(x) if isinstance(x, int) else x for x in args))


def made(name, *args):
    """What a call stores through its first argument."""
    value = ctypes.c_uint64()
    assert cuda(name, ctypes.byref(value), *args) == 0
    return value.value


@pytest.fixture
def stream():
    stream = made("cudaStreamCreate")
    yield stream
    cuda("cudaStreamEndCapture", stream, ANY)  # of a test that left it capturing
    assert cuda("cudaStreamDestroy", stream) == 0
    cuda("cudaGetLastError")


@contextlib.contextmanager
def captured(stream, mode=GLOBAL):
    """A list that holds what launches the captured work once the block is left."""
    assert cuda("cudaStreamBeginCapture", stream, mode) == 0
    launch, graph = [], ctypes.c_uint64()
    yield launch
    assert cuda("cudaStreamEndCapture", stream, ctypes.byref(graph)) == 0
    exec_ = made("cudaGraphInstantiate", graph.value, 0)
    assert cuda("cudaGraphDestroy", graph.value) == 0
    launch.append(lambda: cuda("cudaGraphLaunch", exec_, stream))


def device_array(shape, dtype):
    """cudaMalloc's memory as an array; it is not freed."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(made("cudaMalloc", size)), dtype).reshape(shape)


def to_device(array):
    device = device_array(array.shape, array.dtype)
    assert cuda("cudaMemcpy", device.ctypes.data, array.ctypes.data, array.nbytes, TO_DEVICE) == 0
    return device


def call(cluster=2, wide=0, allowed=65536, rows=128, arch=90, stream=0, replays=0):
    gpu, columns = vgpu.Gpu(arch=arch), 64
    x, out, zeros = np.arange(rows * columns, dtype=np.int32), np.zeros((2 * cluster, rows * columns), np.int32), np.full(64, 7, np.int32)
    gpu.start()
    with gpu.mapped([("x", x, False, True), ("out", out, True, False), ("zeros", zeros, True, False)]):
        with captured(stream) if stream else contextlib.nullcontext() as launch:
            status = gpu.lib.c.runtime_calls(*(ctypes.c_void_p(a.ctypes.data) for a in (x, out, zeros)), rows, columns, cluster, wide, allowed,
                                             ctypes.c_void_p(stream))
            assert not stream or (not out.any() and (zeros == 7).all())
        for _ in range(replays):
            out[:], zeros[:] = 0, 7
            assert launch[0]() == 0
        gpu.finish()
    return status, x, out, zeros


def test_a_launch_with_all_that_it_needs():
    for cluster, wide in (2, 0), (8, 0), (16, 1):
        status, x, out, zeros = call(cluster, wide)
        assert status == 0
        np.testing.assert_array_equal(out, x + np.arange(2 * cluster)[:, None] % cluster)
        np.testing.assert_array_equal(zeros, np.ones(64))


def test_the_same_in_a_graph(stream):
    """Nothing runs while it is captured; a replay does all of it, in order, and so does the next."""
    for replays in 1, 2:
        status, x, out, zeros = call(stream=stream, replays=replays)
        assert status == 0
        np.testing.assert_array_equal(out, x + np.arange(4)[:, None] % 2)
        np.testing.assert_array_equal(zeros, np.ones(64))


WRONG = pytest.mark.parametrize("wrong, status", [
    (dict(cluster=16), 6000 + INVALID_CONFIGURATION),                       # without the attribute for more than 8
    (dict(allowed=16384), 6000 + INVALID_CONFIGURATION),                    # for 32 KiB
    (dict(allowed=232448 + 1), 4000 + INVALID_VALUE), (dict(rows=257), 3000 + INVALID_VALUE),
    (dict(arch=80, allowed=163 * 1024 + 1), 4000 + INVALID_VALUE)])


@WRONG
def test_what_the_runtime_refuses(wrong, status):
    found, _, out, zeros = call(**wrong)
    assert found == status and not out.any() and (zeros == 7).all()


@WRONG
def test_it_refuses_while_capturing_too(wrong, status, stream):
    assert call(**wrong, stream=stream)[0] == status


def test_a_programmatic_launch_in_a_graph(stream):
    """It may overlap with the launch that was captured before it, but the first one waits for the replay before."""
    for times in 1, 2:
        gpu = vgpu.Gpu()
        gpu.start()
        x = to_device(np.zeros(64, np.int32))
        with captured(stream) as launch:
            assert gpu.lib.c.add_overlapping(ctypes.c_void_p(x.ctypes.data), times, ctypes.c_void_p(stream)) == 0
        assert [launch[0](), launch[0]()] == [0, 0]
        if times == 1:
            gpu.finish()
            assert (x == 2).all()
        else:
            with pytest.raises(vgpu.Failure) as failure:
                gpu.finish()
            assert {r["kind"] for r in failure.value.reports} == {"race"}


@pytest.mark.parametrize("arch", (80, 90))
def test_ops_of_the_library_in_a_graph(arch, stream):
    """Rows of tokens and back, by routing that changes between the replays; the arrays come and go with the program's own copies."""
    tokens, top_k, columns = 5, 2, 64
    gpu, rng = vgpu.Gpu(arch=arch), np.random.default_rng(0)
    gpu.start()
    context = gpu.lib.context(device="cuda")
    host = dict(hidden=np.zeros((tokens, columns), np.float16), slots=np.zeros(tokens * top_k, np.int32),
                slot_rows=np.zeros((tokens, top_k), np.int32), weights=np.zeros((tokens, top_k), np.float32))
    device = {name: device_array(x.shape, x.dtype) for name, x in host.items()}
    rows, out, result = device_array((tokens * top_k, columns), np.float16), device_array((tokens, columns), np.float16), host["hidden"].copy()
    with captured(stream) as launch:
        for name, x in host.items():
            assert cuda("cudaMemcpyAsync", device[name].ctypes.data, x.ctypes.data, x.nbytes, TO_DEVICE, stream) == 0
        gpu.lib.call("moe_permute", context, stream=stream, hidden=device["hidden"], sorted_slots=device["slots"], top_k=top_k, rows=rows)
        gpu.lib.call("moe_combine", context, stream=stream, rows=rows, slot_rows=device["slot_rows"], topk_weights=device["weights"], out=out)
        assert cuda("cudaMemcpyAsync", result.ctypes.data, out.ctypes.data, out.nbytes, TO_HOST, stream) == 0
    assert not gpu.counters and np.isnan(out).all()
    for _ in range(2):
        slots = rng.permutation(tokens * top_k)
        host["hidden"][:], host["weights"][:] = rng.standard_normal((tokens, columns)), rng.random((tokens, top_k))
        host["slots"][:], host["slot_rows"][:] = slots, np.argsort(slots).reshape(tokens, top_k)
        assert launch[0]() == 0 and cuda("cudaStreamSynchronize", stream) == 0
        expected = host["hidden"].astype(np.float64) * host["weights"].astype(np.float64).sum(1, keepdims=True)
        np.testing.assert_allclose(result, expected, rtol=2**-10, atol=1e-6)
    gpu.finish()
    assert ["permute" in c["kernel"] for c in gpu.counters] == [True, False, True, False]


FORBIDDEN = {  # while a stream s captures; x is memory from cudaMalloc
    "allocation": (CAPTURE_UNSUPPORTED, lambda s, x: cuda("cudaMalloc", ANY, 256)),
    "freeing": (CAPTURE_UNSUPPORTED, lambda s, x: cuda("cudaFree", x)),
    "synchronising it": (CAPTURE_UNSUPPORTED, lambda s, x: cuda("cudaStreamSynchronize", s)),
    "destroying it": (CAPTURE_UNSUPPORTED, lambda s, x: cuda("cudaStreamDestroy", s)),
    "synchronous copy": (CAPTURE_IMPLICIT, lambda s, x: cuda("cudaMemcpy", x, bytes(4), 4, TO_DEVICE)),
    "synchronising the legacy stream": (CAPTURE_IMPLICIT, lambda s, x: cuda("cudaStreamSynchronize", 0)),
    "memset on the legacy stream": (CAPTURE_IMPLICIT, lambda s, x: cuda("cudaMemsetAsync", x, 0, 4, 0)),
    "launch on the legacy stream": (CAPTURE_IMPLICIT, lambda s, x: cuda("add_overlapping", x, 1, 0)),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_ends_a_capture(what, stream):
    error, forbidden = FORBIDDEN[what]
    vgpu.Gpu().start()
    x, graph, status = to_device(np.zeros(64, np.int32)), ctypes.c_uint64(7), ctypes.c_int()
    assert cuda("cudaStreamBeginCapture", stream, GLOBAL) == 0 and cuda("add_overlapping", x.ctypes.data, 1, stream) == 0
    assert forbidden(stream, x.ctypes.data) == error == cuda("cudaGetLastError")
    assert cuda("cudaStreamIsCapturing", stream, ctypes.byref(status)) == 0 and status.value == 2
    assert cuda("add_overlapping", x.ctypes.data, 1, stream) == cuda("cudaStreamSynchronize", stream) == CAPTURE_INVALIDATED
    assert cuda("cudaStreamEndCapture", stream, ctypes.byref(graph)) == CAPTURE_INVALIDATED and not graph.value and not x.any()
    assert cuda("add_overlapping", x.ctypes.data, 1, stream) == 0 == cuda("cudaStreamSynchronize", stream) and (x == 1).all()
    cuda("cudaGetLastError")


def test_an_op_on_the_wrong_stream_while_capturing(stream):
    gpu, x, slots = vgpu.Gpu(), np.ones((1, 8), np.float16), np.zeros(1, np.int32)
    gpu.start()
    context = gpu.lib.context(device="cuda")
    assert cuda("cudaStreamBeginCapture", stream, RELAXED) == 0
    with pytest.raises(c_api.MixtralError, match="mixtral_moe_permute: CUDA: cudaErrorStreamCaptureImplicit"):
        gpu.lib.call("moe_permute", context, hidden=x, sorted_slots=slots, top_k=1, rows=np.zeros_like(x))
    assert cuda("cudaGetLastError") == 0


def test_a_relaxed_capture_bears_allocations(stream):
    with captured(stream, RELAXED) as launch:
        x = device_array(64, np.int32)
        assert cuda("cudaMemsetAsync", x.ctypes.data, 1, x.nbytes, stream) == 0
    assert launch[0]() == 0 and (x == 0x01010101).all() and cuda("cudaFree", x.ctypes.data) == 0


def test_captures_that_do_not_begin_or_end(stream):
    assert cuda("cudaStreamEndCapture", stream, ANY) == ILLEGAL_STATE
    assert cuda("cudaStreamBeginCapture", 0, GLOBAL) == CAPTURE_UNSUPPORTED
    with captured(stream):
        assert cuda("cudaStreamBeginCapture", stream, GLOBAL) == ILLEGAL_STATE
    assert cuda("cudaStreamBeginCapture", 64, GLOBAL) == cuda("cudaStreamSynchronize", 64) == cuda("cudaMemsetAsync", 0, 0, 0, 64) == INVALID_HANDLE
    cuda("cudaGetLastError")


def test_memory_of_a_program():
    """It is known to kernels from cudaMalloc to cudaFree, undefined until written; a program learns of reports when it synchronises."""
    gpu = vgpu.Gpu()
    x, host = device_array(64, np.int32), np.arange(64, dtype=np.int32)
    address = x.ctypes.data
    assert address % 256 == 0 and made("cudaMalloc", 0) == 0 == cuda("cudaFree", 0)
    for kind, prepare in [("uninitialised", lambda: 0), (None, lambda: cuda("cudaMemcpy", address, host.ctypes.data, 256, TO_DEVICE)),
                          ("out-of-range", lambda: cuda("cudaFree", address))]:
        gpu.start()
        assert prepare() == 0 and cuda("add_overlapping", address, 1, 0) == 0
        back = np.zeros(64, np.int32)
        if kind is None:
            assert cuda("cudaMemcpy", back.ctypes.data, address, 256, TO_HOST) == 0 == cuda("cudaStreamSynchronize", 0)
            np.testing.assert_array_equal(back, host + 1)
            gpu.finish()
            continue
        assert cuda("cudaStreamSynchronize", 0) == LAUNCH_FAILURE == cuda("cudaGetLastError")
        gpu.lib.c.cudaGetErrorString.restype = ctypes.c_char_p
        assert f'"kind": "{kind}"' in cuda("cudaGetErrorString", LAUNCH_FAILURE).decode()
        with pytest.raises(vgpu.Failure, match=kind):
            gpu.finish()
    assert cuda("cudaFree", address) == INVALID_VALUE == cuda("cudaGetLastError")


def test_copies_beyond_an_array():
    vgpu.Gpu().start()
    x, host = device_array(64, np.int32), np.zeros(65, np.int32)
    for size, status in (256, 0), (260, INVALID_VALUE):
        assert cuda("cudaMemcpy", x.ctypes.data, host.ctypes.data, size, TO_DEVICE) == status
        assert cuda("cudaMemcpyAsync", host.ctypes.data, x.ctypes.data, size, TO_HOST, 0) == status
        assert cuda("cudaMemsetAsync", x.ctypes.data, 0, size, 0) == status
    with vgpu.Gpu().mapped([("input", host, False, True)]):
        assert cuda("cudaMemcpy", host.ctypes.data, host.ctypes.data, 4, TO_DEVICE) == INVALID_VALUE == cuda("cudaGetLastError")


def test_the_librarys_own_calls_stay_in_it():
    """Programs may call its runtime, but another one in the process (torch's) never takes its place."""
    vgpu.library()
    path = vgpu.BUILD / "libmixtral_ext_virtual.so"
    exported, relocated = (subprocess.run([*command, path], capture_output=True, text=True, check=True).stdout
                           for command in (["nm", "-D", "--defined-only"], ["readelf", "-r", "-W"]))
    assert len(re.findall(r" T cuda[A-Z]\w+", exported)) > 20 and not re.findall(r"\bcuda[A-Z]\w+", relocated)
