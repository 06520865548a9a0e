"""Tests marked on_silicon run on the virtual GPU and, in gpu-check, on an NVIDIA GPU: what they say of instructions holds on both."""
import pytest

import silicon
import vgpu


def pytest_runtest_setup(item):
    if not item.get_closest_marker("gpu") and (reason := vgpu.missing()):
        pytest.skip(reason)


def pytest_generate_tests(metafunc):
    if metafunc.definition.get_closest_marker("on_silicon"):
        metafunc.parametrize("device_under_test", ["virtual", pytest.param("silicon", marks=pytest.mark.gpu)], indirect=True)


@pytest.fixture(autouse=True)
def device_under_test(request, monkeypatch):
    if getattr(request, "param", "virtual") == "silicon":
        monkeypatch.setattr(vgpu, "Gpu", silicon.Gpu)
