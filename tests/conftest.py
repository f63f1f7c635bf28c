"""What every test may count on: one thread, patient property tests, and the folder of real data when it is there."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # For the processes that tests start.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # Tests fork; a thread pool does not survive that.

# A shared machine makes single examples slow now and then; a deadline would call that a failure.
settings.register_profile(
    "dsv3",
    deadline=None,
    max_examples=50,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("dsv3")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the checkout: tokenizers, texts, problems. Tests that need it skip without it."""
    folder = Path(__file__).parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the folder of real data at {folder}")
    return folder


@pytest.fixture
def our_kernels() -> None:
    """Compute with our kernels, or skip: where they do not compile, the plain forms are all there is."""
    from dsv3.errors import CompilerError  # here, as below
    from dsv3.native import choose_cpu_kernels
    from dsv3.runtime.compiler import find_compiler

    try:
        find_compiler()
    except CompilerError as error:
        pytest.skip(str(error))
    choose_cpu_kernels("native")


@pytest.fixture(autouse=True)
def default_cpu_kernels() -> Iterator[None]:
    """Let no test choose the kernels of the next."""
    yield
    from dsv3.native import choose_cpu_kernels  # here, so that shapes are checked in it: see pyproject.toml

    choose_cpu_kernels("auto")
