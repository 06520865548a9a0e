"""What the built libraries export and need: the promises that let one binary load everywhere."""
import re
import subprocess
from pathlib import Path

import pytest

import c_api

LIB = c_api.NATIVE.parent
HEADER = Path(__file__).parents[1] / "csrc/include/mixtral_ext.h"
SYSTEM = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libgcc_s.so.1", "libstdc++.so.6",
          "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def nm(library, which):
    """(kind, name) of the dynamic symbols; names carry their version, as in malloc@GLIBC_2.2.5."""
    out = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True).stdout
    return [tuple(line.split()[-2:]) for line in out.splitlines()]


def dynamic(library, tag):
    out = subprocess.run(["readelf", "-d", "-W", library], capture_output=True, text=True, check=True).stdout
    return re.findall(rf"\({tag}\).*\[(.*)\]", out)


@pytest.fixture(scope="module")
def numpy_module():
    modules = list(LIB.glob("_numpy.*.so"))
    assert len(modules) == 1, f"expected one build of the numpy module in {LIB}, got {modules}"
    return modules[0]


TORCH_OPS = LIB / "libmixtral_ext_torch.so"


def test_exports_are_the_header():
    declared = set(re.findall(r"\bMIXTRAL_API\b[^;(]*?(\bmixtral_\w+)\(", HEADER.read_text()))
    assert len(declared) == 3 * 2 + 20  # last_error, version, create, destroy, arch, supports; two for each of ten ops
    defined = nm(c_api.NATIVE, "--defined-only")
    assert {name for kind, name in defined} == declared
    assert {kind for kind, name in defined} == {"T"}


def test_library_needs_only_the_system():
    assert dynamic(c_api.NATIVE, "SONAME") == ["libmixtral_ext.so.0"]
    assert set(dynamic(c_api.NATIVE, "NEEDED")) <= SYSTEM  # so neither libcuda nor libcudart, and no torch
    assert not dynamic(c_api.NATIVE, "RPATH") + dynamic(c_api.NATIVE, "RUNPATH")


def test_torch_ops_need_torch_by_name_only():
    assert set(dynamic(TORCH_OPS, "NEEDED")) - SYSTEM == {"libtorch.so", "libtorch_cpu.so", "libmixtral_ext.so.0"}
    assert dynamic(TORCH_OPS, "RUNPATH") == ["$ORIGIN"] and not dynamic(TORCH_OPS, "RPATH")


def test_torch_ops_use_only_the_stable_abi():
    """Every symbol it imports is the C API's, torch's C shim's, or versioned by a system library."""
    shim = re.compile(r"(mixtral|aoti_torch|torch)_[a-z0-9_]+$")
    undefined = nm(TORCH_OPS, "--undefined-only")
    foreign = [name for kind, name in undefined if "@" not in name and not shim.match(name)
               and name not in {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}]
    assert not foreign
    assert not [name for kind, name in undefined if re.search(r"3c10|2at\d|5torch|torch::", name)]
    # Null on a torch without CUDA, so it must not be demanded.
    assert ("w", "aoti_torch_get_current_cuda_stream") in undefined


def test_numpy_module_needs_no_torch(numpy_module):
    assert set(dynamic(numpy_module, "NEEDED")) - SYSTEM == {"libmixtral_ext.so.0"}
    assert dynamic(numpy_module, "RUNPATH") == ["$ORIGIN"]
    foreign = [name for kind, name in nm(numpy_module, "--undefined-only") if "@" not in name and kind == "U"
               and not re.match(r"(mixtral_|_?Py)", name)]
    assert not foreign


@pytest.mark.parametrize("library", sorted(LIB.glob("*.so*")), ids=lambda path: path.name)
def test_no_unique_symbols(library):
    """STB_GNU_UNIQUE symbols are shared across libraries and keep a library from being unloaded."""
    assert not [name for kind, name in nm(library, "--defined-only") if kind == "u"]


@pytest.mark.parametrize("compiler, standard", [("cc", "c99"), ("cc", "c11"), ("c++", "c++17"), ("c++", "c++20")])
def test_header_compiles_alone(tmp_path, compiler, standard):
    source = tmp_path / ("header." + ("c" if compiler == "cc" else "cpp"))
    source.write_text('#include "mixtral_ext.h"\nint main(void) { return sizeof(mixtral_tensor) == 80 ? 0 : 1; }\n')
    subprocess.run([compiler, f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-pedantic", "-I", HEADER.parent,
                    "-fsyntax-only", source], check=True)


def test_ctypes_structs_have_the_sizes_of_the_header(tmp_path):
    """tests/c_api.py declares the structs a second time."""
    names = ["mixtral_tensor", "mixtral_context_options", *(f"mixtral_{op}_params" for op in c_api.OPS)]
    source = tmp_path / "sizes.c"
    source.write_text('#include "mixtral_ext.h"\n#include <stdio.h>\nint main(void) {'
                      + "".join(f' printf("%d\\n", (int)sizeof({name}));' for name in names)
                      + " return 0; }\n")
    subprocess.run(["cc", "-std=c99", "-I", HEADER.parent, source, "-o", tmp_path / "sizes"], check=True)
    sizes = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True).stdout.split()
    structs = [c_api.Tensor, c_api.ContextOptions, *c_api.OPS.values()]
    assert [int(size) for size in sizes] == [c_api.ctypes.sizeof(struct) for struct in structs]
