"""The C API from C programs, compiled as strict C99 against the installed package through CMake and through pkg-config, and from C++
programs with the CUDA runtime."""
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from example_checks import CUDA_EXAMPLES, assert_example

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "tests/c"
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]
TEST_SOURCES = ["test_c_api.c", "test_values.c", "test_attention_values.c", "test_bad_arguments.c", "cases.c"]


def run(*command, **kwargs):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module", params=["cmake", "pkg-config"])
def programs(request, c_prefix, tmp_path_factory):
    """A function that runs the program of that name."""
    build = tmp_path_factory.mktemp(request.param)
    if request.param == "cmake":
        run("cmake", "-S", SOURCES, "-B", build, f"-DCMAKE_PREFIX_PATH={c_prefix}", "-DCMAKE_C_FLAGS=" + " ".join(STRICT),
            "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON")
        run("cmake", "--build", build)
        assert not any((build / example).exists() for example in CUDA_EXAMPLES)
    else:
        if not shutil.which("pkg-config"):
            pytest.skip("pkg-config is not installed")
        paths = dict(os.environ, PKG_CONFIG_PATH=str(c_prefix / "lib/pkgconfig"))
        flags = [flag.replace("\\ ", " ") for flag in re.split(r"(?<!\\)\s+", run("pkg-config", "--cflags", "--libs", "mixtral_ext", env=paths).strip())]
        assert run("pkg-config", "--modversion", "mixtral_ext", env=paths).strip() == "0.1.0"
        sources = [SOURCES / source for source in TEST_SOURCES]
        run("cc", *STRICT, SOURCES / "example.c", *flags, "-o", build / "example")
        run("cc", *STRICT, *sources, *flags, "-lm", "-pthread", "-o", build / "test_c_api")
    # CMake put the library's place into the program; pkg-config leaves that to the user.
    environment = dict(os.environ) if request.param == "cmake" else dict(os.environ, LD_LIBRARY_PATH=str(c_prefix / "lib"))
    return lambda name, *arguments: run(build / name, *arguments, env=environment)


@pytest.mark.parametrize("part", ["values", "errors", "context", "threads"])
def test_c_api(programs, part):
    programs("test_c_api", part)


def test_example(programs):
    """The example's numbers are those of the formulas on the arrays it fills."""
    assert_example(programs("example"))


@pytest.fixture(scope="module")
def cuda_build(c_prefix, tmp_path_factory):
    """Where the C++ programs are, from the same project where CMake finds the CUDA runtime."""
    if not shutil.which("nvcc"):
        pytest.skip("no CUDA toolkit: nvcc is not on PATH")
    build = tmp_path_factory.mktemp("cuda")
    run("cmake", "-S", SOURCES, "-B", build, f"-DCMAKE_PREFIX_PATH={c_prefix}", "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror -pedantic")
    run("cmake", "--build", build, "--target", *CUDA_EXAMPLES)
    return build


@pytest.mark.parametrize("example", CUDA_EXAMPLES)
def test_cuda_example_is_built(cuda_build, example):
    """It needs the library, the CUDA runtime and the system; where there is no GPU, it says so."""
    needed = re.findall(r"\(NEEDED\).*\[(\w+)", run("readelf", "-d", "-W", cuda_build / example))
    assert {"libmixtral_ext", "libcudart"} <= set(needed) <= {"libmixtral_ext", "libcudart", "libstdc", "libm", "libgcc_s", "libc"}
    done = subprocess.run([cuda_build / example], capture_output=True, text=True, env=dict(os.environ, CUDA_VISIBLE_DEVICES=""))
    assert done.returncode == 1 and not done.stdout
    assert re.search("CUDA: cudaError|built without CUDA", done.stderr)


@pytest.mark.gpu
@pytest.mark.parametrize("example", CUDA_EXAMPLES)
def test_cuda_example(tmp_path, example):
    """With the library in mixtral_ext/lib, wherever that was built."""
    lib = ROOT / "mixtral_ext/lib"
    run("nvcc", "-std=c++17", SOURCES / f"{example}.cpp", "-I", ROOT / "csrc/include", f"-Xlinker={lib / 'libmixtral_ext.so.0'},-rpath,{lib}",
        "-o", tmp_path / example)
    CUDA_EXAMPLES[example](run(tmp_path / example))


def test_package_needs_nothing_else(c_prefix, build_tree):
    """Neither the targets file nor pkg-config ask a program to link more than the library, or know where it was built."""
    files = [*c_prefix.glob("lib/cmake/mixtral_ext/*.cmake"), c_prefix / "lib/pkgconfig/mixtral_ext.pc"]
    assert len(files) == 5
    for file in files:
        text = file.read_text()
        for word in ("cudart", "CUDA::", "INTERFACE_LINK_LIBRARIES", "LINK_DEPENDENT", str(build_tree), str(SOURCES.parents[1]), "/first"):
            assert word not in text, (file, word)
    assert (c_prefix / "lib/libmixtral_ext.so").resolve() == (c_prefix / "lib/libmixtral_ext.so.0").resolve()
    assert [file.name for file in (c_prefix / "include").iterdir()] == ["mixtral_ext.h"]


@pytest.mark.parametrize("asked, found", [("0.1", True), ("0.1.0", True), ("0.2", False), ("1.0", False)])
def test_package_version(c_prefix, tmp_path, asked, found):
    (tmp_path / "CMakeLists.txt").write_text(f"cmake_minimum_required(VERSION 3.16)\nproject(p LANGUAGES C)\n"
                                             f"find_package(mixtral_ext {asked} CONFIG REQUIRED)\n")
    done = subprocess.run(["cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={c_prefix}"],
                          capture_output=True, text=True)
    assert (done.returncode == 0) == found, done.stderr
