"""Triton kernels are interpreted here too, which is decided before any test is read."""

from ..fp8.conftest import interpreted

__all__ = ["interpreted"]
