"""Kernels from a few lines of PTX, for tests of the virtual GPU.

A body is text; its lines count from 1 and are what reports call "k.cu:<line>". Before it runs, %t is the thread in the block, %b
the block, %g the thread in the grid (x only), %lane the lane and %warp the warp (64-bit: %gl, %tl); argument i is in %a<i> if it
is an array or has 64 bits, else in %n<i>; %x<i> is argument i plus 4 %g, %y<i> plus 16 %g. Registers %p, %h (16 bits), %r, %l
(64 bits), %f and %d are declared. The line at which a planted bug must be reported ends in "// caught".
"""
import re

import numpy as np
import pytest

import vgpu

REGISTERS = """.reg .pred %p<32>; .reg .b16 %h<64>; .reg .b32 %r<300>; .reg .b64 %l<64>; .reg .f32 %f<64>; .reg .f64 %d<16>;
.reg .b32 %t, %b, %g, %lane, %warp, %blockdim; .reg .b64 %gl, %tl;"""


def size_of(argument):
    return 8 if isinstance(argument, np.ndarray) else argument.nbytes


def kernel(body, args, arch=80, variables="", module_variables=""):
    """PTX of a kernel k with this body. variables: declarations of the kernel; module_variables: of the module."""
    params, registers, load = [], [], []
    for i, size in enumerate(map(size_of, args)):
        if size in (4, 8):
            name = f"%{'a' if size == 8 else 'n'}{i}"
            params.append(f".param .b{8 * size} q{i}")
            registers.append(f".reg .b{8 * size} {name};")
            load.append(f"ld.param.b{8 * size} {name}, [q{i}];")
        else:
            params.append(f".param .align 16 .b8 q{i}[{size}]")
        if size == 8:
            registers.append(f".reg .b64 %x{i}, %y{i};")
            load.append(f"mad.wide.u32 %x{i}, %g, 4, %a{i}; mad.wide.u32 %y{i}, %g, 16, %a{i};")
    lines = [line if line.strip().startswith(".reg") else f".loc 1 {n} 1\n{line}" for n, line in enumerate(body.split("\n"), 1)]
    return "\n".join([".version 8.0", f".target sm_{arch}", ".address_size 64", '.file 1 "k.cu"', module_variables,
                      f".visible .entry k({', '.join(params)}) {{", REGISTERS, *registers, variables, ".loc 1 1000 1",
                      "mov.u32 %t, %tid.x; mov.u32 %b, %ctaid.x; mov.u32 %blockdim, %ntid.x; mad.lo.u32 %g, %b, %blockdim, %t;",
                      "mov.u32 %lane, %laneid; shr.u32 %warp, %t, 5; cvt.u64.u32 %gl, %g; cvt.u64.u32 %tl, %t;", *load, *lines,
                      ".loc 1 1001 1", "ret;", "}"])


def run(body, *args, arch=80, variables="", module_variables="", seed=0, random_completion=False, options=None, **launch):
    """Launches the kernel once and returns its counters (None on an NVIDIA GPU)."""
    gpu = vgpu.Gpu(arch=arch, seed=seed, random_completion=random_completion, **dict(instruction_limit=10**8) | (options or {}))
    gpu.module(kernel(body, args, arch, variables, module_variables)).launch("k", args=args, **launch)
    return gpu.counters[-1] if gpu.virtual else None


def caught(kind, body, *args, also=(), **more):
    """Runs a kernel that must be reported with this kind at a line marked "// caught" (of several: at any of them; a race is found
    by whoever comes second), and otherwise only with what is in `also`: (kind, line) pairs. kind: of several, one|another."""
    lines = {f"k.cu:{n}" for n, line in enumerate(body.split("\n"), 1) if "// caught" in line}
    with pytest.raises(vgpu.Failure) as failure:
        run(body, *args, **more)
    found = {(r["kind"], r["where"]) for r in failure.value.reports} - {(k, f"k.cu:{line}") for k, line in also}
    assert lines and found and found <= {(k, line) for k in kind.split("|") for line in lines}, str(failure.value)
    return failure.value.reports


def twins(body):
    """The two kernels of a text with <<wrong|right>> in it."""
    assert "<<" in body
    return [re.sub(r"<<(.*?)\|(.*?)>>", rf"\{i}", body, flags=re.DOTALL) for i in (1, 2)]


def aligned(shape, dtype, offset=0):
    """Zeros whose first element lies `offset` bytes behind a multiple of 256."""
    dtype = np.dtype(dtype)
    memory = np.zeros(int(np.prod(shape)) * dtype.itemsize + 512, np.uint8)
    begin = -memory.ctypes.data % 256 + offset
    return memory[begin:begin + int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)
