import pytest

import c_api


@pytest.fixture(scope="session")
def lib():
    """The C API of the library that is built into mixtral_ext/lib."""
    return c_api.Library()
