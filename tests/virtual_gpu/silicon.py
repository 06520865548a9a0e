"""An NVIDIA GPU behind the interface of vgpu.Gpu, through the CUDA driver: the kernels of the virtual GPU's own tests run on both, and
so confirm what it says instructions do. Reports and counters are the virtual GPU's alone."""
import atexit
import contextlib
import ctypes
import functools
import os
import re

import pytest

import vgpu


class DriverError(Exception):
    """A call of the CUDA driver that failed, by name and number."""


class Driver:
    """libcuda with the primary context of device 0. `lost`: the error of a kernel, after which no call of this process succeeds, neither
    in a context that was reset nor in a new one."""

    def __init__(self):
        self.cuda, self.device, self.lost = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), None
        context = ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(self.device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self.device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name, *args):
        if status := getattr(self.cuda, name)(*args):
            raise DriverError(f"{name}: error {status}")

    def wait_for(self, kernel):
        try:
            self.call("cuCtxSynchronize")
        except DriverError as error:
            self.lost = self.lost or f"{error} in kernel {kernel}, {os.environ.get('PYTEST_CURRENT_TEST', 'outside of a test')}"
            raise

    def attribute(self, which):
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), which, self.device)
        return value.value

    def release(self):
        self.cuda.cuDevicePrimaryCtxRelease_v2(self.device)


@functools.cache
def driver():
    """One for all Gpus: to make a context takes longer than a test."""
    made = Driver()
    atexit.register(made.release)
    return made


class Gpu:
    """Device 0. Code for a newer one skips the test, and so does a device that is lost. The schedule is the hardware's, so the settings
    do nothing."""
    virtual = False
    library_ptx = vgpu.Gpu.library_ptx

    def __init__(self, arch=90, seed=0, random_completion=False, sm_count=4, instruction_limit=0, max_reports=0):
        self.arch, self.counters, self.arrays = arch, [], {}
        self.driver, self.cuda, self.call = driver(), driver().cuda, driver().call
        if self.driver.lost:
            pytest.skip(f"the process lost its device: {self.driver.lost}")
        self.capability = [self.driver.attribute(which) for which in (75, 76)]  # COMPUTE_CAPABILITY_MAJOR, _MINOR

    def module(self, ptx):
        target, specific = re.search(r"^\.target sm_(\d+)(a?)", ptx, re.M).groups()
        wanted, here = int(target), self.capability[0] * 10 + self.capability[1]
        if here < wanted or (specific and here != wanted):
            pytest.skip(f"needs compute capability {target}{specific}, this device has {here}")
        return Module(self, ptx)

    @contextlib.contextmanager
    def mapped(self, arrays):
        """The arrays' memory on the device, copied there and, what is writable, back at the end."""
        made = {}
        for address, size, _, writable, _ in vgpu.ranges_of(arrays, {address: size for address, (_, size, _) in self.arrays.items()}):
            pointer = ctypes.c_uint64()
            self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
            self.call("cuMemcpyHtoD_v2", pointer, ctypes.c_void_p(address), ctypes.c_size_t(size))
            made[address] = pointer, size, writable
        self.arrays.update(made)
        try:
            yield
            for address, (pointer, size, writable) in made.items():
                if writable:
                    self.call("cuMemcpyDtoH_v2", ctypes.c_void_p(address), pointer, ctypes.c_size_t(size))
        finally:
            for address, (pointer, _, _) in made.items():
                self.cuda.cuMemFree_v2(pointer)
                del self.arrays[address]

    def pointer(self, array):
        address, size = vgpu.memory_of(array)
        found = [pointer.value + array.ctypes.data - a for a, (pointer, n, _) in self.arrays.items() if a <= address < a + n]
        return found[0] if size else 0


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint32 * 16)]


class _Config(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("shared", ctypes.c_uint32), ("stream", ctypes.c_void_p),
                ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint32)]


COOPERATIVE, CLUSTER_DIMENSION, PROGRAMMATIC = 2, 4, 6  # CUlaunchAttributeID
MAX_DYNAMIC_SHARED, WIDE_CLUSTERS = 8, 14  # CUfunction_attribute


class Module:
    """Kernels from PTX text; `launch` takes what vgpu.Module.launch takes."""

    def __init__(self, gpu, ptx):
        self.gpu, self.handle, self.ptx, self.kernels = gpu, ctypes.c_void_p(), ptx, vgpu.kernels_of(ptx)
        gpu.call("cuModuleLoadData", ctypes.byref(self.handle), ptx.encode() + b"\0")

    def __del__(self):
        if self.handle:
            self.gpu.cuda.cuModuleUnload(self.handle)

    def launch(self, kernel, grid=1, block=32, args=(), shared=0, cluster=(), written=None, fresh=(), programmatic=False,
               cooperative=False):
        name = vgpu.one_kernel(self.kernels, kernel)
        with self.gpu.mapped(vgpu.arrays_of(args, written, fresh)):
            self._launch(name, *vgpu.shape_of(grid, block, cluster), args, vgpu.whole("shared", shared),
                         [PROGRAMMATIC] * programmatic + [COOPERATIVE] * cooperative)
            self.gpu.driver.wait_for(name)

    def _launch(self, name, grid, block, cluster, args, shared, flags):
        gpu, function = self.gpu, ctypes.c_void_p()
        gpu.call("cuModuleGetFunction", ctypes.byref(function), self.handle, name.encode())
        if shared > 48 * 1024:
            gpu.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, ctypes.c_int(shared))
        values = vgpu.values_of(args, self.kernels[name], gpu.pointer, gpu.cuda.cuTensorMapEncodeTiled)
        attributes = (_Attribute * 3)()
        count = 0
        if gpu.capability[0] >= 9:  # of more than 8 blocks, given here or by the kernel's own directive
            gpu.call("cuFuncSetAttribute", function, WIDE_CLUSTERS, ctypes.c_int(1))
        if any(cluster):
            attributes[count].id = CLUSTER_DIMENSION
            attributes[count].value[:3] = cluster
            count += 1
        for flag in flags:
            attributes[count].id = flag
            attributes[count].value[0] = 1
            count += 1
        config = _Config((ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*block), shared, None, attributes, count)
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(value.ctypes.data for value in values))
        gpu.call("cuLaunchKernelEx", ctypes.byref(config), function, pointers, None)
