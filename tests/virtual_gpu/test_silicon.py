"""The correct kernels of the virtual GPU's own tests on an NVIDIA GPU: silicon agrees with what it computes."""
import pytest

import runs
import silicon
import vgpu

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("source, kernel, run", runs.CORRECT, ids=[kernel for _, kernel, _ in runs.CORRECT])
def test_correct_kernels(source, kernel, run):
    import torch
    arch = {runs.SM80: "80", runs.SM90: "90a"}[source]
    if arch == "90a" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("sm_90a code runs on compute capability 9.0 alone")
    run(silicon.Gpu(int(arch[:2])).module(vgpu.compile(source, arch)), kernel)
