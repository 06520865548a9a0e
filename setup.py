"""Builds the libraries with CMake and puts them beside the Python package; every flag lives in CMake's files."""
import os
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def run(self):
        if find_spec("torch") is None:
            sys.exit("mixtral_ext builds its torch ops against the torch that will load them, and this Python has none.\n"
                     "Install torch 2.11 or newer first (for a CPU: pip install torch==2.13.0), then run\n"
                     "    pip install --no-build-isolation .")
        package = (ROOT if self.editable_mode else Path(self.build_lib).resolve()) / "mixtral_ext"
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        # cmake and ninja as pip installs them lie beside this Python, which need not be on PATH.
        env = os.environ | {"PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())

        def cmake(*arguments):
            subprocess.run(["cmake", *map(str, arguments)], check=True, env=env)

        cmake("-S", ROOT, "-B", build, "-G", "Ninja", "-DMIXTRAL_EXT_WITH_PYTHON=ON", f"-DPython_EXECUTABLE={sys.executable}",
              *os.environ.get("CMAKE_ARGS", "").split())
        cmake("--build", build, "--parallel", jobs)
        cmake("--install", build, "--component", "python", "--prefix", package)

    # The extension below only marks the wheel as built for one platform; CMake has put the files in place.
    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


setup(ext_modules=[Extension("mixtral_ext_cmake", sources=[])], cmdclass={"build_ext": CMakeBuild})
