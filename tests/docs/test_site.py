"""The documentation site: every folder and public name has its place, and what is built is whole and loads nothing."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import dsv3

from ..contract.test_public_names import LOADED_MODEL

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DESCRIBES_ITSELF = {"cli"}
"""Folders without a page of the API: the command line has --help."""
MENTION = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
HEADING = re.compile(r"^#{1,6} (.+?)\s*$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def described() -> dict[str, str]:
    """Return what the pages of the API describe, and on which."""
    pages = (DOCS / "api").glob("*.md")
    return {name: page.name for page in pages for name in MENTION.findall(page.read_text(encoding="utf-8"))}


def test_every_module_of_every_folder_is_on_a_page_of_the_api():
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in ROOT.glob("dsv3/*/*.py")}
    modules = {name for name in modules if not name.endswith("__init__") and name.split(".")[1] not in DESCRIBES_ITSELF}
    whole = described()
    assert {name for name in modules if name not in whole and name.rpartition(".")[0] not in whole} == set()


def test_what_the_api_describes_exists():
    for name in described():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


def test_the_public_names_are_on_the_first_page_of_the_api():
    page = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    assert [name for name in dsv3.__all__ if f"`dsv3.{name}`" not in page] == []
    from dsv3.infer.loaded import LoadedModel

    functions = {name: value for name, value in vars(LoadedModel).items() if name in LOADED_MODEL and callable(value)}
    assert [name for name, value in functions.items() if not value.__doc__] == []  # one without is not shown


def test_links_between_pages_lead_to_files():
    lost = []
    for page in DOCS.rglob("*.md"):
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            target = urlsplit(link)
            if not target.scheme and target.path and not (page.parent / unquote(target.path)).exists():
                lost.append(f"{page.relative_to(ROOT)}: {link}")
    assert lost == []


def headings(page: Path) -> set[str]:
    """Return the names that the headings of a page get, and those of what it describes."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    found: set[str] = set(MENTION.findall(text))
    for title in HEADING.findall(text):
        plain = re.sub(r"\]\([^)]*\)", "", title)
        name = slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        for number in range(1, 100):
            if name not in found:
                break
            name = f"{slug}_{number}"
        found.add(name)
    return found


def test_links_to_places_in_pages_lead_to_headings():
    """As the site makes names of them; of the API, to what a page describes."""
    lost = []
    for page in DOCS.rglob("*.md"):
        for link in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
            target = urlsplit(link)
            aim = (page.parent / unquote(target.path)).resolve() if target.path else page
            if target.scheme or not target.fragment or aim.suffix != ".md":
                continue
            name = unquote(target.fragment)
            if name not in headings(aim) and not any(
                name.startswith(f"{one}.") for one in MENTION.findall(aim.read_text())
            ):
                lost.append(f"{page.relative_to(ROOT)}: {link}")
    assert lost == []


def test_the_navigation_names_pages_that_there_are():
    named = re.findall(r"^\s*- (?:[^:\n]+: )?([\w./*-]+(?:\.md|\*))$", (DOCS / ".nav.yml").read_text(), re.MULTILINE)
    assert len(named) > 20
    assert [name for name in named if not list(DOCS.glob(name))] == []


def test_what_the_site_needs_is_an_extra_and_is_pinned():
    """What `make docs` installs: each plugin and theme of mkdocs.yml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    names = {re.split(r"[\[<>=~ ]", one)[0] for one in extras}
    assert {"mkdocs-material", "mkdocs-awesome-nav"} <= names
    assert any(name.startswith("mkdocstrings") for name in names)
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert names <= pinned


def mkdocs() -> list[str]:
    """Return the command that builds the site, or skip."""
    ours = ROOT / ".venv-docs" / "bin" / "mkdocs"
    if ours.exists():
        return [str(ours)]
    if find_spec("mkdocs") and find_spec("mkdocstrings") and find_spec("material") and find_spec("mkdocs_awesome_nav"):
        return [sys.executable, "-m", "mkdocs"]
    pytest.skip("needs what `make docs` installs")


class Page(HTMLParser):
    """What a page loads, where its links lead, and the places in it that have names."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.names: set[str] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.names |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and "canonical" not in (given.get("rel") or "") and given.get("href"):
            self.loads.append(given["href"])
        elif given.get("src"):
            self.loads.append(given["src"])

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site of this checkout, and of one page more that nobody has named anywhere."""
    command, folder = mkdocs(), tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    shutil.copytree(DOCS, folder / "docs")
    for name in ("dsv3", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "docs" / "a-new-page.md").write_text("# A page that was added\n\nSee [home](index.md).\n")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*command, "build", "--strict", "--quiet"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    found = {}
    for file in site.rglob("*.html"):
        found[file] = page = Page()
        page.feed(file.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_a_page_that_is_added_is_in_the_navigation(site, pages):
    assert "A page that was added" in " ".join(pages[site / "index.html"].words)
    assert "a-new-page.html" in pages[site / "index.html"].links


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere_and_nothing_that_is_missing(site, pages):
    for file, page in pages.items():
        base = site if file.name == "404.html" else file.parent
        for load in page.loads:
            assert not urlsplit(load).scheme, f"{file.name} loads {load}"
            assert not load.startswith("//"), f"{file.name} loads {load}"
            assert (base / urlsplit(load).path.lstrip("/" if base == site else "")).is_file(), f"{file.name}: {load}"
        assert "mermaid" not in file.read_text(encoding="utf-8").split("<body", 1)[1], (
            "would be drawn by a script of elsewhere"
        )
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
def test_links_lead_to_pages_and_to_places_in_them(site, pages):
    lost = []
    for file, page in pages.items():
        if file.name == "404.html":  # its links begin at the root of whatever server has the site
            continue
        for link in page.links:
            target = urlsplit(link)
            if target.scheme:
                continue
            aim = (file.parent / unquote(target.path)).resolve() if target.path else file
            if not aim.exists() or (target.fragment and unquote(target.fragment) not in pages[aim].names):
                lost.append(f"{file.relative_to(site)}: {link}")
    assert lost == []


@pytest.mark.slow
def test_the_members_of_a_loaded_model_are_described(site, pages):
    described = pages[site / "api" / "index.html"].names
    assert [name for name in LOADED_MODEL if f"dsv3.infer.loaded.LoadedModel.{name}" not in described] == []
