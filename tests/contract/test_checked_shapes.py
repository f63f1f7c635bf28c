"""Every module whose annotations have shapes is one whose shapes are checked while the tests run."""

import tomllib
from pathlib import Path

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
