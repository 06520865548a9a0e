import os
import subprocess
import sys
from pathlib import Path

import pytest

import c_api

ROOT = Path(__file__).parents[1]
# Tools that were installed into this environment (cmake, ninja) come first.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="session")
def lib():
    """The C API of the library that is built into mixtral_ext/lib."""
    return c_api.Library()


@pytest.fixture(scope="session", params=c_api.CPU_ARCHS)
def cpu_build(request, lib):
    """(library, architecture)"""
    if request.param not in lib.archs():
        pytest.skip(f"this machine has no {request.param}")
    return lib, request.param


@pytest.fixture(scope="session")
def build_tree():
    """The CMake build directory that library comes from."""
    native = c_api.NATIVE.read_bytes()
    for cache in sorted(ROOT.glob("build*/**/CMakeCache.txt")):
        built = cache.parent / "libmixtral_ext.so.0"
        if built.exists() and built.read_bytes() == native:
            return cache.parent
    pytest.fail(f"no build directory holds the library of {c_api.NATIVE}: build it here, as `make build` does")


@pytest.fixture(scope="session")
def c_prefix(build_tree, tmp_path_factory):
    """An installed C package, moved after its installation."""
    there, here = tmp_path_factory.mktemp("install") / "first", tmp_path_factory.mktemp("install") / "moved here"
    subprocess.run(["cmake", "--install", build_tree, "--component", "c", "--prefix", there], check=True, capture_output=True)
    there.rename(here)
    return here


def _without_gpu():
    try:
        import torch
    except ImportError:
        return "needs torch with CUDA"
    return None if torch.cuda.is_available() else "needs an NVIDIA GPU and a torch with CUDA; this machine has none"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and (reason := _without_gpu()):
        pytest.skip(reason)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param
