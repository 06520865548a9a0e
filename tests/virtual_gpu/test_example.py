"""The CUDA examples of tests/c as they stand, linked with the library over the virtual GPU."""
import subprocess

import pytest

import vgpu
from example_checks import CUDA_EXAMPLES


def run(example, *settings):
    vgpu.library()
    return subprocess.run([vgpu.BUILD / example, *settings], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("example", CUDA_EXAMPLES)
def test_example(example, arch, seed):
    """What the virtual GPU reports would be the error of cudaStreamSynchronize."""
    done = run(example, f"architecture={arch}", f"seed={seed}", "sm_count=4")
    assert done.returncode == 0, done.stderr
    CUDA_EXAMPLES[example](done.stdout)


def test_unknown_settings():
    for setting in "colour=3", "architecture=70", "seed":
        done = run("example_cuda", setting)
        assert done.returncode == 1 and done.stderr == f"virtual GPU: there is no such setting: {setting}\n"
