import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

pytest.importorskip("fsspec", reason="needs the extra 'data'")

import fsspec

from dsv3.config.curation import CurationConfig, InputConfig, ReadingConfig
from dsv3.data.curation.files import InputFile, divide, list_files, make_plan, planned_files
from dsv3.data.curation.reading import read_raw
from dsv3.data.document import ReadingLog
from dsv3.errors import DataError

SMALL = ReadingConfig(max_document_bytes=1000, max_line_bytes=4096)


def read(path, *, config=SMALL, **about):
    log = ReadingLog()
    source = InputConfig(path=str(path), name="in", **about)
    files = list_files(source, number=0, log=log)
    return [raw for file in files for raw in read_raw(file, source=source, config=config, log=log)], log


def test_a_folder_is_read_in_order_and_each_file_by_its_kind(tmp_path):
    (tmp_path / "b.py").write_text("import os\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some prose\n"))
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    found, log = read(tmp_path)
    assert [(raw.name, raw.text.strip(), raw.kind, raw.language) for raw in found] == [
        ("in/a.txt.gz", "some prose", "prose", ""),
        ("in/b.py", "import os", "code", "python"),
        ("in/c.jsonl#1", "one", "prose", ""),
        ("in/c.jsonl#2", "two", "prose", ""),
    ]
    assert {remark.count for remark in log.skipped_remarks()} == {1}


def test_a_line_without_an_end_is_cut_and_nothing_of_it_is_lost(tmp_path):
    (tmp_path / "line.txt").write_text("word " * 5000)
    found, _ = read(tmp_path / "line.txt")
    assert len(found) > 20
    assert max(len(raw.text) for raw in found) <= 1000
    assert "".join(raw.text for raw in found).replace(" ", "") == "word" * 5000
    assert len({raw.name for raw in found}) == len(found)


def test_memory_does_not_follow_the_length_of_a_line(tmp_path):
    """A line 32 times as long takes no more, as text, as JSON and as a page, packed with gzip or not."""
    config = ReadingConfig(max_document_bytes=2**15, max_line_bytes=2**16, max_page_bytes=2**16)

    def peak(file: Path) -> int:
        source, log = InputConfig(path=str(file), name="in"), ReadingLog()
        tracemalloc.start()
        for raw in read_raw(list_files(source, number=0, log=log)[0], source=source, config=config, log=log):
            assert len(raw.text.encode()) <= 2 * config.max_document_bytes
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    for name in ("line.txt", "line.jsonl", "page.html"):
        peaks: dict[int, int] = {}
        for size in (2**18, 2**23):
            words = "the wind of 春天 " * (size // 20)
            before, after = {"line.txt": ("", ""), "line.jsonl": ('{"text": "', '"}'), "page.html": ("<p>", "</p>")}[
                name
            ]
            data = f"{before}{words}{after}".encode()
            (tmp_path / name).write_bytes(data)
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data, 1))
            peaks[size] = max(peak(tmp_path / name), peak(tmp_path / f"{name}.gz"))
        assert peaks[2**23] < 1.1 * peaks[2**18] < 2**21, name


def test_a_page_with_more_tags_than_its_tree_may_have_is_passed_over_and_counted(tmp_path):
    (tmp_path / "page.html").write_text("<html><body>" + "<p>The wind of the sea.</p>" * 60)
    found, log = read(tmp_path / "page.html", config=ReadingConfig(max_page_tags=100))
    assert found == []
    assert [(remark.reason, remark.count) for remark in log.skipped_remarks()] == [("page with more than 100 tags", 1)]


def test_a_long_text_in_chinese_is_cut_by_bytes(tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "春天来了。\n" * 500}, ensure_ascii=False))
    found, _ = read(tmp_path / "long.jsonl", config=ReadingConfig(max_document_bytes=1000))
    assert max(len(raw.text.encode()) for raw in found) <= 1000
    assert "\n".join(raw.text for raw in found) == "\n".join(["春天来了。"] * 500)


def test_a_long_record_is_cut_at_line_ends_and_a_longer_line_is_passed_over(tmp_path):
    text = "\n".join(f"line {number} of a long record" for number in range(100))
    lines = [json.dumps({"text": text}), json.dumps({"text": "x" * 9000}), json.dumps({"text": "after"})]
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    found, log = read(tmp_path / "long.jsonl")
    assert "\n".join(raw.text for raw in found[:-1]) == text
    assert found[-1].text == "after"
    assert [remark.reason for remark in log.skipped_remarks()] == ["line longer than 0 MiB"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("junk.txt", bytes(range(256)) * 30),
        ("junk.jsonl", bytes(range(256)) * 30),
        ("cut.txt.gz", gzip.compress(b"text " * 5000, mtime=0)[:60]),
        ("no.txt.gz", b"not gzip at all"),
        ("no.parquet", b"PAR1 and nothing"),
        ("no.html", bytes(range(128, 256)) * 9),
        ("no.warc.gz", b"not an archive"),
        ("empty.txt", b""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_file_ends_a_task(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    found, log = read(tmp_path / name)
    assert found == [] or name == "cut.txt.gz"
    assert log.skipped_remarks() or found


def test_broken_encodings_are_read_and_counted(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Möwe über dem Fluß".encode("latin-1"))
    (tmp_path / "wide.txt").write_text("wide text", encoding="utf-16")
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud800 half"}\n')
    found, log = read(tmp_path)
    assert [raw.text for raw in found] == ["\ufffd half", "Möwe über dem Fluß", "wide text"]
    assert sum(remark.count for remark in log.changed_remarks()) == 3


def test_the_main_text_of_a_page_is_read(tmp_path):
    body = "<p>" + "The river flows through the old town, and the bridge over it is closed. " * 8 + "</p>"
    page = f"<html><body><nav><a href=/>Home</a></nav><article><h1>River</h1>{body}</article></body></html>"
    (tmp_path / "page.html").write_text(page)
    [raw], _ = read(tmp_path / "page.html")
    assert "flows through the old town" in raw.text
    assert "Home" not in raw.text
    assert raw.kind == "web"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # warcio leaves its files open
def test_pages_and_texts_of_an_archive_are_read(tmp_path):
    warcio = pytest.importorskip("warcio.warcwriter")
    from io import BytesIO

    from warcio.statusandheaders import StatusAndHeaders

    page = ("<html><body><article><p>" + "A page about the sea and the wind of that land. " * 12).encode()
    with (tmp_path / "crawl.warc.gz").open("wb") as file:
        writer = warcio.WARCWriter(file, gzip=True)
        headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.0")
        writer.write_record(
            writer.create_warc_record("http://a.b/", "response", payload=BytesIO(page), http_headers=headers)
        )
        plain = BytesIO(b"A converted text.")
        writer.write_record(
            writer.create_warc_record("http://a.c/", "conversion", payload=plain, warc_content_type="text/plain")
        )
    found, _ = read(tmp_path / "crawl.warc.gz", config=ReadingConfig())
    assert [raw.text[:17] for raw in found] == ["A page about the ", "A converted text."]


def test_files_behind_a_url_are_read_as_those_on_a_disk(tmp_path):
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/texts/a.txt", b"first text")
    store.pipe("/bucket/texts/deep/b.jsonl.gz", gzip.compress(b'{"text": "second"}\n'))
    try:
        found, _ = read("memory://bucket/texts")
        assert [(raw.name, raw.text) for raw in found] == [
            ("in/a.txt", "first text"),
            ("in/deep/b.jsonl.gz#1", "second"),
        ]
        chosen, _ = read("memory://bucket/texts/*.txt")
        assert [raw.text for raw in chosen] == ["first text"]
    finally:
        store.rm("/bucket", recursive=True)


def test_a_store_that_is_not_installed_or_not_there_says_so():
    with pytest.raises(DataError, match=r"cannot (read|list) nosuch://"):
        read("nosuch://bucket/x")


def test_a_pattern_chooses_files(tmp_path):
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    found, _ = read(tmp_path / "*.txt")
    assert [raw.name for raw in found] == ["in/a.txt", "in/b.txt"]


def test_tasks_are_stretches_of_the_list_of_about_the_same_size(tmp_path):
    sizes = [5000, 100, 90_000, 200, 300, 40_000, 1, 0, 70_000]
    files = [InputFile(source=0, url=str(n), path=str(n), size=size) for n, size in enumerate(sizes)]
    for tasks in (1, 2, 3, 9, 50):
        parts = divide(files, tasks=tasks, task_bytes=1)
        assert [file for part in parts for file in part] == files
        assert all(parts)
        assert len(parts) <= tasks
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    config = CurationConfig(inputs=(InputConfig(path=str(tmp_path / "in"), name="in"),))
    assert make_plan(config, folder=tmp_path / "work") == 1
    (tmp_path / "in" / "b.txt").write_text("comes too late: the plan stands")
    assert make_plan(config, folder=tmp_path / "work") == 1
    assert [file.path for file in planned_files(tmp_path / "work", task=0)] == ["a.txt"]
