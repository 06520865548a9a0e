"""What silicon.py asks of the CUDA driver, by one that counts the calls, keeps device memory on the host and runs one kernel."""
import collections
import ctypes
import functools

import numpy as np
import pytest

import runs
import silicon
import vgpu


class Cuda:
    """Takes the place of libcuda. Arguments without a C type are pointers (bytes, None) or ints of 32 bits."""

    def __init__(self):
        self.calls, self.memory, self.launches, self.at_exit = collections.Counter(), {}, [], []
        self.error = 0

    def __getattr__(self, name):
        def function(*args):
            assert all(not isinstance(x, int) or -2**31 <= x < 2**31 for x in args), (name, args)
            self.calls[name] += 1
            return self.error or handler(*args) or 0
        handler = getattr(type(self), f"on_{name}", lambda self, *args: 0).__get__(self)
        return function

    def on_cuDeviceGetAttribute(self, value, which, device):
        value._obj.value = {75: 9, 76: 0}[which]

    def on_cuModuleLoadData(self, module, image):
        assert image.endswith(b"\0")
        if b".target" not in image:
            return 218  # CUDA_ERROR_INVALID_PTX
        module._obj.value = self.calls["cuModuleLoadData"]

    def on_cuMemAlloc_v2(self, pointer, size):
        memory = np.zeros(size.value, np.uint8)
        pointer._obj.value = memory.ctypes.data
        self.memory[memory.ctypes.data] = memory

    def on_cuMemFree_v2(self, pointer):
        del self.memory[pointer.value]

    def on_cuMemcpyHtoD_v2(self, to, source, size):
        ctypes.memmove(to.value, source.value, size.value)

    on_cuMemcpyDtoH_v2 = on_cuMemcpyHtoD_v2

    def on_cuLaunchKernelEx(self, config, function, values, extra):
        """A kernel of (x, out, n) that reverses; of no elements, an illegal instruction, which shows only later and stays."""
        assert extra is None
        self.launches.append(config._obj)
        if ctypes.c_int32.from_address(values[2]).value == 0:
            self.error = 715
            return
        x, out = (self.memory[ctypes.c_uint64.from_address(values[i]).value] for i in range(2))
        out.view(np.int32)[:] = x.view(np.int32)[ctypes.c_int32.from_address(values[2]).value - 1::-1]


@pytest.fixture
def cuda(monkeypatch):
    fake = Cuda()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    monkeypatch.setattr(silicon.atexit, "register", fake.at_exit.append)
    monkeypatch.setattr(silicon, "driver", functools.cache(silicon.driver.__wrapped__))
    return fake


def test_what_is_taken_is_given_back(cuda):
    for _ in range(3):
        module = silicon.Gpu().module(vgpu.compile(runs.SM80, "80"))
        runs.reverse(module, "reverse_correct")
        del module
    for take, give, times in [("cuModuleLoadData", "cuModuleUnload", 3), ("cuMemAlloc_v2", "cuMemFree_v2", 6)]:
        assert cuda.calls[take] == cuda.calls[give] == times and not cuda.memory
    assert cuda.calls["cuDevicePrimaryCtxRetain"] == len(cuda.at_exit) == 1 and not cuda.calls["cuDevicePrimaryCtxRelease_v2"]
    cuda.at_exit[0]()
    assert cuda.calls["cuDevicePrimaryCtxRelease_v2"] == 1


def test_launches(cuda):
    """The configuration as the driver reads it (CUlaunchConfig, CUlaunchAttribute of cuda.h), and what is refused."""
    module, x, out = silicon.Gpu().module(vgpu.compile(runs.SM80, "80")), np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    shape = dict(grid=(4, 3), block=64, cluster=(2,), shared=50_000, programmatic=True, written={1})
    module.launch("reverse_correct", args=[x, out, np.int32(64)], **shape)
    np.testing.assert_array_equal(out, x[::-1])
    config, = cuda.launches
    assert bytes(config)[:28] == np.array([4, 3, 1, 64, 1, 1, 50_000], np.uint32).tobytes()
    assert (ctypes.sizeof(config), silicon._Config.attributes.offset, silicon._Config.count.offset) == (56, 40, 48)
    attributes = np.array([4, 0, 2, 1, 1, *13 * [0], 6, 0, 1, *15 * [0]], np.uint32)
    assert config.count == 2 and ctypes.string_at(config.attributes, 2 * 72) == attributes.tobytes()
    with pytest.raises(ValueError, match="argument 2: the kernel takes 4 bytes of type .u, got 4 of float32"):
        module.launch("reverse_correct", args=[x, out, np.float32(64)], **shape)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="argument 1: a read-only array"):
        module.launch("reverse_correct", args=[x, out, np.int32(64)], **shape)
    assert len(cuda.launches) == 1 and not cuda.memory


def test_an_error_of_a_kernel_loses_the_device(cuda):
    """It fails its own test, and all that come later are skipped for that reason."""
    gpu = silicon.Gpu()
    module, x, out = gpu.module(vgpu.compile(runs.SM80, "80")), np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    with pytest.raises(silicon.DriverError, match="cuCtxSynchronize: error 715"), gpu.mapped([("x", x, False, True)]):
        module.launch("reverse_correct", args=[x, out, np.int32(0)])
    assert not gpu.arrays and not out.any()
    with pytest.raises(silicon.DriverError, match="cuMemAlloc_v2: error 715"):
        module.launch("reverse_correct", args=[x, out, np.int32(64)])
    for _ in range(2):
        with pytest.raises(pytest.skip.Exception, match=r"^the process lost its device: cuCtxSynchronize: error 715 in kernel "
                                                        r"reverse_correct, .*::test_an_error_of_a_kernel_loses_the_device \(call\)$"):
            silicon.Gpu()


def test_other_errors_leave_the_device(cuda):
    kept = silicon.Gpu().module(vgpu.compile(runs.SM80, "80"))
    with pytest.raises(silicon.DriverError, match="cuModuleLoadData: error 218"):
        silicon.Module(silicon.Gpu(), "no PTX")
    runs.reverse(kept, "reverse_correct")
    runs.reverse(silicon.Gpu().module(vgpu.compile(runs.SM80, "80")), "reverse_correct")


def test_arrays_that_overlap(cuda):
    """They have one buffer, in which each lies where it does on the host; one of no bytes has none."""
    gpu, x = silicon.Gpu(), np.arange(64, dtype=np.int32)
    with gpu.mapped([("x", x[:40], False, True), ("end", x[8:], True, True), ("none", x[:0], True, True)]):
        (base, memory), = cuda.memory.items()
        np.testing.assert_array_equal(memory.view(np.int32), x)
        assert [gpu.pointer(part) - base for part in (x, x[8:], x[4:20:2], x[::-1])] == [0, 32, 16, 252] and gpu.pointer(x[:0]) == 0
        memory.view(np.int32)[60] = 99
        with gpu.mapped([("part", x[4:8], True, True)]):
            assert cuda.calls["cuMemAlloc_v2"] == 1
        assert x[60] == 60
    assert x[60] == 99 and not gpu.arrays and not cuda.memory


def test_unknown_settings(cuda):
    with pytest.raises(TypeError, match="colour"):
        silicon.Gpu(colour=3)
    assert silicon.Gpu(arch=80, seed=1, random_completion=True, sm_count=2, instruction_limit=10**5, max_reports=1).arch == 80


def test_library_ptx():
    assert silicon.Gpu.library_ptx() == vgpu.Gpu.library_ptx() != []
