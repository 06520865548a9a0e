"""Builds the libraries with CMake and puts them beside the Python package; every flag lives in CMakeLists.txt."""
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
    def build_extension(self, ext):
        if find_spec("torch") is None:
            sys.exit("mixtral_ext builds its torch ops against the torch that will load them, and this Python has none.\n"
                     "Install torch 2.11 or newer first (for a CPU: pip install torch==2.13.0), then run\n"
                     "    pip install --no-build-isolation .")
        package = Path(self.get_ext_fullpath(ext.name)).parent.resolve() / "mixtral_ext"
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
                     "-DMIXTRAL_EXT_WITH_PYTHON=ON", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        # cmake and ninja as pip installs them lie beside this Python, which need not be on PATH.
        env = os.environ | {"PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        subprocess.run(configure, check=True, env=env)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True, env=env)
        subprocess.run(["cmake", "--install", str(build), "--component", "python", "--prefix", str(package)],
                       check=True, env=env)


setup(ext_modules=[Extension("mixtral_ext_cmake", sources=[])], cmdclass={"build_ext": CMakeBuild})
