"""C++ to a library: kept, found again, and refused in words."""

import ctypes
from pathlib import Path

import pytest

from dsv3.errors import CompilerError
from dsv3.runtime import compiler
from dsv3.runtime.compiler import compiled_library, find_compiler


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    try:
        find_compiler()
    except CompilerError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "answer.cpp"
    file.write_text('#include "number.h"\nextern "C" int answer() { return NUMBER; }\n')
    (tmp_path / "number.h").write_text("#define NUMBER 42\n")
    return file


def test_a_library_is_compiled_once_and_found_again(source: Path, monkeypatch: pytest.MonkeyPatch):
    library = compiled_library("test", sources=[source])
    assert ctypes.CDLL(str(library)).answer() == 42
    monkeypatch.setattr(compiler, "_compile", lambda *_, **__: pytest.fail("compiled again"))
    assert compiled_library("test", sources=[source]) == library


def test_a_changed_header_makes_another_library(source: Path):
    first = compiled_library("test", sources=[source])
    (source.parent / "number.h").write_text("#define NUMBER 43\n")
    second = compiled_library("test", sources=[source])
    assert second != first
    assert ctypes.CDLL(str(second)).answer() == 43


def test_refused_sources_say_the_compilers_first_error_and_leave_nothing(source: Path):
    source.write_text("int answer( {\n")
    with pytest.raises(CompilerError, match=r"refused the sources: .*answer\.cpp:1.*error"):
        compiled_library("test", sources=[source])
    assert list(compiler.cache_folder().iterdir()) == []


def test_a_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompilerError, match=r"none of c\+\+, g\+\+ and clang\+\+ is on the path; install one"):
        find_compiler()
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(CompilerError, match="CXX = 'icpx' is not on the path"):
        find_compiler()


def test_a_cache_that_cannot_be_written_is_said(source: Path, monkeypatch: pytest.MonkeyPatch):
    blocked = source.parent / "a file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(CompilerError, match=r"cannot be kept in .*a file/dsv3"):
        compiled_library("test", sources=[source])
