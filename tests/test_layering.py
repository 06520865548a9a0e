"""Who may include whom, and where machine code may stand: DESIGN.md's layers, enforced."""
import re
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".inc", ".cu", ".cuh"})
ALLOWED = {"include": set(), "core": {"include"}, "cpu": {"core", "include"}, "cuda": {"core", "include"},
           "api": {"include", "cpu", "cuda", "core"}, "bindings": {"include"}}
ISA_FILE = re.compile(r"_(avx2|avx512|avx512bf16|amx)\.cpp$")
INTRINSIC = re.compile(r"\b_mm\d*_\w+|\b_tile_\w+|\b__m(128|256|512)|\b__builtin_ia32_\w+|\b[a-z]*mmintrin\.h")
PTX_FILE = re.compile(r"cuda/common/ptx_\w+\.cuh$")
LAUNCH = re.compile(r"<<<|\bcudaLaunch\w+|\bcuLaunch\w+|\b__global__\b")


def layer(path):
    return path.relative_to(CSRC).parts[0]


def code(path):
    """The file without comments and without the text of string literals (but with the names it includes)."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", path.read_text(), flags=re.S)
    return re.sub(r'^(?!\s*#\s*include)(.*)$', lambda line: re.sub(r'"(\\.|[^"\\])*"', '""', line[0]), text, flags=re.M)


def lines_with(pattern, path):
    return [f"{path.relative_to(CSRC)}: {line.strip()}" for line in code(path).splitlines() if re.search(pattern, line)]


def test_every_source_is_in_a_layer():
    assert SOURCES and {layer(path) for path in SOURCES} == set(ALLOWED)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes(path):
    for quote, name in re.findall(r'^\s*#\s*include\s+(["<])([^">]+)[">]', path.read_text(), re.M):
        if quote == '"':
            included = (path.parent / name).resolve()
            assert included.is_file(), f"{name} is not there"
            assert layer(included) in ALLOWED[layer(path)] | {layer(path)}, f"{layer(path)} may not include {name}"
            continue
        if re.match(r"(torch|ATen|c10|pybind11|caffe2)/|Python\.h|numpy/", name):
            assert layer(path) == "bindings", f"{name} outside bindings"
        if re.match(r"cuda|cooperative_groups|mma\.h|cub/|thrust/|cutlass|cute/", name):
            assert layer(path) == "cuda", f"{name} outside cuda"
        assert not re.match(r"(cub|thrust|cutlass|cute)\b", name), "kernels depend on the CUDA runtime alone"


def test_header_includes_only_c_standard_headers():
    header = (CSRC / "include/mixtral_ext.h").read_text()
    assert set(re.findall(r"#\s*include\s+(\S+)", header)) == {"<stddef.h>", "<stdint.h>"}


def test_intrinsics_stand_in_isa_files():
    found = [line for path in SOURCES if not ISA_FILE.search(path.name) for line in lines_with(INTRINSIC, path)]
    assert not found


def test_assembly_stands_in_ptx_files():
    found = [line for path in SOURCES if not PTX_FILE.search(path.as_posix()) for line in lines_with(r"\b(__)?asm(__)?\b", path)]
    assert not found


def test_launches_stand_in_cuda():
    found = [line for path in SOURCES if layer(path) != "cuda" for line in lines_with(LAUNCH, path)]
    assert not found


def test_bindings_hold_no_kernel_matter():
    """No tile sizes (a tile is a kernel's business), no intrinsics, no launches."""
    found = [line for path in SOURCES if layer(path) == "bindings"
             for line in lines_with(rf"(?i)tile|\bkBlock|threadIdx|blockDim|{INTRINSIC.pattern}|{LAUNCH.pattern}", path)]
    assert not found


def test_ops_neither_allocate_nor_synchronise_nor_throw_nor_start_threads():
    """api/context.cpp alone allocates: the context itself."""
    allocates = r"\b(malloc|calloc|realloc|alloca|aligned_alloc|posix_memalign)\s*\(|\bnew\b(?!\s*\()|std::(vector|string|map|function|unique_ptr|shared_ptr)\b"
    other = r"\bthrow\b|std::(thread|async|mutex)\b|\bpthread_|#\s*pragma\s+omp|cudaMalloc|cudaFree|\bcuda\w+Synchronize\b|cudaMemcpy\b"
    found = [line for path in SOURCES if layer(path) in {"api", "cpu", "cuda"}
             for line in lines_with(other if path.name == "context.cpp" else f"{allocates}|{other}", path)]
    assert not found


def test_isa_objects_share_nothing(build_tree):
    """A weak or unique symbol in an object compiled for AVX-512 could replace baseline code at link time. So such objects
    define local symbols, and as external ones only functions of mixtral::."""
    objects = [path for path in (build_tree / "CMakeFiles").rglob("*.cpp.o") if ISA_FILE.search(path.name.removesuffix(".o"))]
    assert len(objects) == len([path for path in SOURCES if ISA_FILE.search(path.name)])
    for path in objects:
        nm = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        for address, kind, name in (line.split() for line in nm.splitlines()):
            assert kind in "tdbrT", f"{path.name}: {kind} {name}"
            assert kind != "T" or name.startswith("_ZN7mixtral"), f"{path.name}: {name}"
