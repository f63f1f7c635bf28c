"""One browser, one tab and one scripted server for all tests of this folder."""

import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pytest


def load_beside(name: str):
    """Import a file of this folder, which is no package; dataclasses want to find their module by its name."""
    full_name = f"dsv3_browser_tests_{name}"
    if full_name not in sys.modules:
        spec = util.spec_from_file_location(full_name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[full_name] = util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full_name])
    return sys.modules[full_name]


@pytest.fixture(scope="session")
def scripted() -> type:
    """The module of the scripted server."""
    pytest.importorskip("fastapi", reason="needs dsv3[serve]")
    pytest.importorskip("uvicorn", reason="needs dsv3[serve]")
    return load_beside("scripted_server")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    chromium = load_beside("chromium")
    program = chromium.find_chromium()
    if program is None:
        pytest.skip(f"needs a browser, one of {', '.join(chromium.NAMES)}")
    with chromium.Chromium(program) as started:
        yield started


@pytest.fixture(scope="module")
def running_server(scripted) -> Iterator:
    from dsv3.serve.page import chat_page, content_security_policy

    with scripted.ScriptedServer() as server:
        server.page = (chat_page(), content_security_policy())
        yield server


@pytest.fixture
def server(running_server):
    running_server.reset()
    return running_server


@pytest.fixture(scope="module")
def tab(browser) -> Iterator:
    tab = browser.open_page()
    yield tab
    tab.close()


@pytest.fixture
def page(tab, server) -> Iterator:
    """The chat page as somebody finds it who has never been there. It must never throw or break its policy."""
    # Listeners run in the order they came: the page saves itself on leaving, and then it is forgotten.
    tab.evaluate("addEventListener('pagehide', () => { if (origin !== 'null') sessionStorage.clear() })")
    tab.resize(1200, 800)
    tab.prefer("light")
    tab.forget_complaints()
    tab.open(server.url)
    tab.wait_for("document.querySelector('#model')?.options.length > 0")
    yield tab
    assert tab.complaints() == []
