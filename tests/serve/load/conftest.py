"""The scripted server of the browser tests, as something to load."""

import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def scripted():
    """The module of the scripted server."""
    pytest.importorskip("fastapi", reason="needs dsv3[serve]")
    pytest.importorskip("uvicorn", reason="needs dsv3[serve]")
    name = "dsv3_load_tests_scripted_server"
    spec = util.spec_from_file_location(name, Path(__file__).parents[1] / "browser" / "scripted_server.py")
    sys.modules[name] = util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="module")
def running_server(scripted) -> Iterator:
    with scripted.ScriptedServer() as server:
        yield server


@pytest.fixture
def server(running_server):
    running_server.reset()
    return running_server
