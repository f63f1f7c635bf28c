"""Every module whose annotations have shapes is one whose shapes are checked while the tests run."""

import tomllib
from pathlib import Path

import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from torch import Tensor

from dsv3.ops.on_gpu import _power_of_two
from dsv3.ops.swiglu import swiglu

from ..conftest import checked

ROOT = Path(__file__).parents[2]


def test_modules_with_shapes_are_those_that_are_checked():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"].split()
    (listed,) = [option for option in options if option.startswith("--jaxtyping-packages=")]
    *checked, checker = listed.partition("=")[2].split(",")
    assert checker == "beartype.beartype"
    with_shapes = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in sorted((ROOT / "dsv3").rglob("*.py"))
        if "from jaxtyping import" in file.read_text()
    ]
    lacking = [name for name in with_shapes if not any(name == one or name.startswith(f"{one}.") for one in checked)]
    assert not lacking, f"add {lacking} to --jaxtyping-packages in pyproject.toml"
    assert all(any(name == one or name.startswith(f"{one}.") for name in with_shapes) for one in checked)


def test_shapes_that_do_not_go_together_are_found():
    swiglu(torch.ones(2, 3), up=torch.ones(2, 3))
    for gate, up in (
        (torch.ones(2, 3), torch.ones(2, 4)),  # another width
        (torch.ones(6), torch.ones(6)),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)),
    ):
        with pytest.raises(BeartypeCallHintViolation):
            swiglu(gate, up=up)


def test_what_is_returned_and_what_has_no_shape_is_checked_too():
    with pytest.raises(BeartypeCallHintViolation):
        _power_of_two(1.5)
    with pytest.raises(BeartypeCallHintViolation):
        checked(typechecker=beartype)(_wider)(torch.ones(2, 3))


def _wider(x: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
    return torch.cat([x, x], dim=1)
