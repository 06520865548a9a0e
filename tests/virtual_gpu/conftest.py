import pytest

import vgpu


def pytest_runtest_setup(item):
    if not item.get_closest_marker("gpu") and (reason := vgpu.missing()):
        pytest.skip(reason)
