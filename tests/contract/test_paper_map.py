"""docs/paper-map.md cannot rot: what it names exists, and what must be in it is in it."""

import ast
import importlib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dsv3.config.files import leaves, to_dict
from dsv3.recipes import v3_671b
from dsv3.recipes.differences import LEFT_OPEN

ROOT = Path(__file__).parents[2]
MAP = ROOT / "docs" / "paper-map.md"
CONFORMANCE = "tests/conformance"

TRAINING_TABLE = (
    "optimizer",
    "gradient norm",
    "sequence length",
    "14.8T tokens",
    "learning rate",
    "batch size",
    "gamma",
    "alpha",
    "lambda",
    "initial weights",
    "weight average",
    "YaRN off",
    "YaRN: s = 40",
)
"""The rows of report 4.2 and 4.3: each begins a row of 'Training hyper-parameters'."""


@dataclass(frozen=True)
class Row:
    section: str
    report: str
    what: str
    symbols: tuple[str, ...]
    tests: tuple[str, ...]
    state: str


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@cache
def tables() -> dict[str, list[list[str]]]:
    """Return the rows of every table, by the heading it stands under."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in MAP.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif line.startswith("|") and not set(line) <= set("|-: "):
            found.setdefault(heading, []).append(cells(line))
    return {heading: rows[1:] for heading, rows in found.items()}  # without the line of titles


def quoted(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", cell))


def full_test_id(test: str) -> str:
    return test if test.startswith("tests/") else f"{CONFORMANCE}/{test}"


@cache
def rows() -> tuple[Row, ...]:
    """Return the rows that say what is here."""
    return tuple(
        Row(heading, row[0], row[1], quoted(row[2]), tuple(map(full_test_id, quoted(row[3]))), row[4])
        for heading, table in tables().items()
        for row in table
        if len(row) == 5
    )


@cache
def functions_of(path: Path) -> dict[str, str]:
    """Return the tests of a file with their docstrings, read without running it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name: ast.get_docstring(node) or ""
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def resolve(symbol: str) -> Any:
    module, _, name = symbol.partition(":")
    found = importlib.import_module(f"dsv3.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_the_map_was_read():
    assert len(rows()) > 60
    assert {len(row) for table in tables().values() for row in table} == {3, 4, 5}


@pytest.mark.parametrize("symbol", sorted({symbol for row in rows() for symbol in row.symbols}))
def test_every_symbol_imports(symbol):
    assert resolve(symbol) is not None


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.report} {row.what[:40]}")
def test_every_row_names_a_symbol_and_a_test_that_exists(row):
    assert row.symbols
    assert row.tests
    for test in row.tests:
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), file
        assert name in functions_of(ROOT / file), test
    assert row.state == "here"


def test_every_conformance_test_stands_in_the_map_and_says_what_it_catches():
    named = {test for row in rows() for test in row.tests}
    named |= {full_test_id(test) for test in re.findall(r"`(test_\w+\.py::\w+)`", MAP.read_text(encoding="utf-8"))}
    for file in sorted((ROOT / CONFORMANCE).glob("test_*.py")):
        for name, docstring in functions_of(file).items():
            assert f"{CONFORMANCE}/{file.name}::{name}" in named, f"{name} has no row in docs/paper-map.md"
            assert docstring.startswith("Catches: "), f"{name} does not say whose mistake it catches"


@pytest.mark.parametrize("number", range(1, 29))
def test_every_equation_of_the_report_has_one_row(number):
    found = [row for table in tables().values() for row in table if re.search(rf"\beq\. {number}\b", row[0])]
    assert len(found) == 1
    assert found[0][-1] == "here"
    if number <= 25:
        tests = [test for row in rows() if re.search(rf"\beq\. {number}\b", row.report) for test in row.tests]
        assert all(test.startswith(CONFORMANCE) for test in tests)


@pytest.mark.parametrize("item", TRAINING_TABLE)
def test_every_row_of_the_published_training_table_is_there(item):
    found = [row for row in rows() if row.section == "Training hyper-parameters" and row.what.startswith(item)]
    assert len(found) == 1
    assert any(test.startswith(CONFORMANCE) for test in found[0].tests)


def test_what_is_not_there_yet_says_so_and_nothing_else():
    assert tables()["Not there yet"]
    assert {row[2] for row in tables()["Not there yet"]} == {"not there yet"}


def unpublished() -> list[list[str]]:
    return tables()["Not published: our named settings and their defaults"]


@pytest.mark.parametrize("row", [row for row in unpublished() if row[1] != "no setting"], ids=lambda row: row[1])
def test_every_default_of_an_unpublished_setting_is_the_real_one(row):
    [setting], [default] = quoted(row[1]), quoted(row[2])
    value = to_dict(v3_671b())
    for part in setting.split("."):
        value = value[part]
    assert value == json.loads(default)


def test_the_settings_that_inspect_calls_open_are_in_the_map():
    """One list for programs and one for readers: here they are held together."""
    named = {setting for row in unpublished() for setting in quoted(row[1])}
    partly_published = {"data.fim_rate", "optim.weight_decay"}  # their rows say 'no setting' for the open half
    assert set(LEFT_OPEN) - partly_published <= named
    assert named <= {key for key, _ in leaves(v3_671b())}


def test_every_test_and_file_that_the_page_on_numerics_names_exists():
    text = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|dsv3)/[^`]*)`", text)
    assert len(named) > 20
    for path in named:
        file, _, name = path.partition("::")
        assert (ROOT / file).exists(), path
        assert not name or name in functions_of(ROOT / file), path
