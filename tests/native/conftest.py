import pytest


@pytest.fixture(autouse=True)
def always_our_kernels(our_kernels: None) -> None:
    """All tests of this folder are of our kernels."""
