import json
import os

import pytest

from dsv3.config import DataConfig, SourceConfig
from dsv3.data import corpus
from dsv3.data.corpus import named_sources, read_documents
from dsv3.data.document import MAX_EXAMPLES, ReadingLog
from dsv3.data.sources import DEFAULT_SOURCES
from dsv3.errors import DataError


def read(path):
    log = ReadingLog()
    documents = list(read_documents(SourceConfig(path=str(path)), log=log))
    return {document.name: document.text for document in documents}, log


def test_a_folder_of_everything_is_read_and_every_oddity_counted(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "deep" / "b.md").write_text("# heading")
    (tmp_path / "deep" / "er" / "C.PY").write_text("x = 1")
    (tmp_path / "chat.jsonl").write_text('{"text": "line"}\n{broken\n{"text": "  "}\n')
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "spaces.txt").write_text(" \n ")
    (tmp_path / "binary.txt").write_bytes(bytes(100))
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    (tmp_path / "surrogate.jsonl").write_text('{"text": "half \\ud800 pair"}')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path)
    texts, log = read(tmp_path)
    assert texts == {
        "a.txt": "plain",
        "chat.jsonl#1": "line",
        "deep/b.md": "# heading",
        "deep/er/C.PY": "x = 1",
        "latin.txt": "déjà",
        "surrogate.jsonl#1": "half \ufffd pair",
    }
    assert {remark.reason.split(" (")[0]: remark.examples for remark in log.skipped_remarks()} == {
        "binary file": ("binary.txt",),
        "broken JSON": ("chat.jsonl#2",),
        "empty": ("chat.jsonl#3", "empty.txt", "spaces.txt"),
        "hidden folder": (".git",),
        "link to a folder": ("loop",),
        "kind of file is none of .txt .md .py .jsonl .jsonl.gz .parquet": ("picture.png",),
        "not a regular file, or a link to nowhere": ("nowhere.txt",),
    }
    assert [remark.examples for remark in log.changed_remarks()] == [("surrogate.jsonl#1",), ("latin.txt",)]


def test_documents_come_in_the_order_of_their_names(tmp_path):
    for name in ("b.txt", "a.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    assert list(read(tmp_path)[0]) == ["a.txt", "b.txt", "c.txt"]


def test_a_single_file_is_a_source(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    assert read(tmp_path / "a.txt")[0] == {"a.txt": "plain"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_are_counted(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "a.txt").chmod(0)
    texts, log = read(tmp_path)
    assert texts == {}
    assert log.skipped_remarks()[0].reason == "cannot be read (Permission denied)"


def test_a_reading_error_is_counted_not_raised(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text('{"text": "line"}')

    def broken(path, *, name, log):
        raise OSError(5, "Input/output error")
        yield

    monkeypatch.setitem(corpus.READERS, ".txt", broken)
    texts, log = read(tmp_path)
    assert texts == {"b.jsonl#1": "line"}
    assert log.skipped_remarks()[0].reason == "cannot be read (Input/output error)"


def test_reading_is_lazy(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 3)
    documents = read_documents(SourceConfig(path=str(tmp_path)), log=ReadingLog())
    assert next(documents).name == "a.jsonl#1"
    (tmp_path / "a.jsonl").unlink()  # Open already; the rest of it was not needed yet.
    assert next(documents).name == "a.jsonl#2"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "there is nothing at missing; give a file"),
        ("s3://bucket", r"cannot read s3://bucket; a source is a path, hf://NAME or builtin://NAME"),
        ("builtin://poems", "no built-in source 'poems'; the built-in ones are arithmetic, bible"),
    ],
)
def test_a_source_that_is_not_there_says_what_would_be(path, message):
    with pytest.raises(DataError, match=message):
        read(path)


def test_a_file_of_another_kind_is_refused_by_name(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match=r"a\.pdf: its kind is none of \.txt"):
        read(tmp_path / "a.pdf")


def test_a_log_keeps_few_examples_and_counts_all(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(["not an object"]) + "\n" + "oops\n" * 1000)
    _, log = read(tmp_path)
    counted = {remark.reason: (remark.count, len(remark.examples)) for remark in log.skipped_remarks()}
    assert counted == {"broken JSON": (1000, MAX_EXAMPLES), "a JSON list where an object was expected": (1, 1)}


def test_unnamed_sources_take_the_last_part_of_their_path_and_no_two_share_a_name():
    paths = ["/a/books/", "/b/books", "hf://owner/set?split=test", "builtin://bible", "x.jsonl"]
    config = DataConfig(sources=tuple(SourceConfig(path=path) for path in paths))
    assert [source.name for source in named_sources(config)] == ["books", "books-2", "set", "bible", "x.jsonl"]


def test_no_sources_stand_for_the_built_in_corpus():
    assert named_sources(DataConfig()) == DEFAULT_SOURCES
