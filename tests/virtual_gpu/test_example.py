"""tests/c/example_cuda.cpp as it stands, linked with the library over the virtual GPU."""
import subprocess

import pytest

import vgpu
from example_checks import assert_example_cuda


def run(*settings):
    vgpu.library()
    return subprocess.run([vgpu.BUILD / "example_cuda", *settings], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("arch", (80, 90))
def test_example(arch, seed):
    """What the virtual GPU reports would be the error of cudaStreamSynchronize."""
    done = run(f"architecture={arch}", f"seed={seed}", "sm_count=4")
    assert done.returncode == 0, done.stderr
    assert_example_cuda(done.stdout)


def test_unknown_settings():
    for setting in "colour=3", "architecture=70", "seed":
        done = run(setting)
        assert done.returncode == 1 and done.stderr == f"virtual GPU: there is no such setting: {setting}\n"
