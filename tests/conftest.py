import pytest

import c_api


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
