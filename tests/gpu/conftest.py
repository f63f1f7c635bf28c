"""Tests that compute on a GPU, and skip where there is none; `make test-gpu` runs them by themselves.

Other tests have Triton interpret its kernels, which is decided when they are defined, for the whole process.
"""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    """The first GPU, with FP32 products in FP32."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets its kernels in this process; run these by themselves: make test-gpu")
    return torch.device("cuda:0")


@pytest.fixture
def hopper(gpu: torch.device) -> torch.device:
    """A GPU that multiplies FP8 as we do."""
    if torch.cuda.get_device_capability(gpu) < (9, 0):
        pytest.skip(f"needs compute capability 9.0 or more, which {torch.cuda.get_device_name(gpu)} has not")
    return gpu
