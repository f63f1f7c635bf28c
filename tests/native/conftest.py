import pytest

from dsv3.errors import CompilerError
from dsv3.native import choose_cpu_kernels
from dsv3.runtime.compiler import find_compiler


@pytest.fixture(autouse=True)
def our_kernels() -> None:
    """Compute with our kernels, or skip: where they do not compile, the plain forms are all there is."""
    try:
        find_compiler()
    except CompilerError as error:
        pytest.skip(str(error))
    choose_cpu_kernels("native")
