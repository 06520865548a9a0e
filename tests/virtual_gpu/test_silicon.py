"""The correct kernels of the virtual GPU's own tests on an NVIDIA GPU: silicon agrees with what it computes."""
import pytest

import runs
import silicon
import vgpu

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("source, kernel, run", runs.CORRECT, ids=[kernel for _, kernel, _ in runs.CORRECT])
def test_correct_kernels(source, kernel, run):
    run(silicon.Gpu().module(vgpu.compile(source, {runs.SM80: "80", runs.SM90: "90a"}[source])), kernel)
