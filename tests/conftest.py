import os
import subprocess
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores; the OpenMP runtime reads this when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_PROC_BIND", "false")  # the benches ask for "true", which would put all of them on the first core

import pytest

import c_api
from one_at_a_time import one_at_a_time

ROOT = Path(__file__).parents[1]
# Tools that were installed into this environment (cmake, ninja) come first.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="session")
def lib():
    """The C API of the library that is built into mixtral_ext/lib."""
    return c_api.Library()


@pytest.fixture(scope="session")
def emulated_lib():
    """The same sources with every x86 instruction set emulated (tests/emulated_isa)."""
    source, build = ROOT / "tests/emulated_isa", ROOT / "build/emulated_isa"
    with one_at_a_time():
        subprocess.run(["cmake", "-S", source, "-B", build, "-G", "Ninja"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["cmake", "--build", build, "--parallel", "2"], check=True, stdout=subprocess.DEVNULL)
    return c_api.Library(build / "libmixtral_ext_emulated.so")


@pytest.fixture(scope="session", params=[f"{kind}-{arch}" for kind in ("native", "emulated") for arch in c_api.CPU_ARCHS
                                         if (kind, arch) != ("emulated", "portable")])
def cpu_build(request):
    """(library, architecture): every CPU architecture, natively where the machine has it, and emulated."""
    kind, arch = request.param.split("-")
    library = request.getfixturevalue("emulated_lib" if kind == "emulated" else "lib")
    if kind == "native" and arch not in library.archs():
        pytest.skip(f"this machine has no {arch}")
    return library, arch


@pytest.fixture(scope="session")
def build_tree():
    """The CMake build directory that library comes from."""
    native = c_api.NATIVE.read_bytes()
    with one_at_a_time():  # CMake makes and removes folders there
        for cache in sorted(ROOT.glob("build*/**/CMakeCache.txt")):
            built = cache.parent / "libmixtral_ext.so.0"
            if built.exists() and built.read_bytes() == native:
                return cache.parent
    pytest.fail(f"no build directory holds the library of {c_api.NATIVE}: build it here, as `make build` does")


@pytest.fixture(scope="session")
def c_prefix(build_tree, tmp_path_factory):
    """An installed C package, moved after its installation."""
    there, here = tmp_path_factory.mktemp("install") / "first", tmp_path_factory.mktemp("install") / "moved here"
    with one_at_a_time():
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
