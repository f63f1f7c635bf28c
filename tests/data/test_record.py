import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsv3.data.document import ReadingLog
from dsv3.data.record import read_json_lines, read_parquet, record_text


def remarks(log):
    return {remark.reason: remark.count for remark in (*log.skipped_remarks(), *log.changed_remarks())}


@pytest.fixture
def read(tmp_path):
    """Return the texts in a JSON lines file of the given bytes, and what was remarked."""

    def read_bytes(data, *, name="file.jsonl"):
        (tmp_path / name).write_bytes(data)
        log = ReadingLog()
        documents = list(read_json_lines(tmp_path / name, name=name, log=log))
        return [document.text for document in documents], remarks(log)

    return read_bytes


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"text": "a", "content": "b", "id": 3}, "a"),
        ({"content": "b"}, "b"),
        ({"text": None, "content": "b"}, "b"),
        ({"prompt": "1+1", "completion": "2"}, "<｜User｜>1+1<｜Assistant｜>2"),
        (
            {
                "messages": [
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "hello"},
                    {"role": "user", "content": "bye"},
                    {"role": "assistant", "content": "so long"},
                ]
            },
            "be brief<｜User｜>hi<｜Assistant｜>hello<｜end▁of▁sentence｜><｜User｜>bye<｜Assistant｜>so long",
        ),
        ({"text": 5}, None),
        ({"prompt": "1+1"}, None),
        ({"messages": []}, None),
        ({"messages": "hi"}, None),
        ({"messages": ["hi"]}, None),
        ({"messages": [{"role": "tool", "content": "12"}]}, None),
        ({"messages": [{"role": "user", "content": None}]}, None),
        ({}, None),
    ],
)
def test_the_text_of_a_record(values, text):
    assert record_text(values) == text


def test_lines_end_at_line_feeds_alone(read):
    texts = ["a\u2028b", "c\u0085d", "e\x1cf", "g\rh"]
    data = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode()
    assert read(data) == (texts, {})


def test_broken_lines_are_counted_and_the_others_read(read):
    lines = [
        b'{"text": "one"}',
        b'{"text": "cut',
        b"",
        b"[1]",
        b'"string"',
        b"not json",
        b'{"id": 1}',
        b'{"text": "two"}',
    ]
    texts, counted = read(b"\n".join(lines))
    assert texts == ["one", "two"]
    assert counted == {
        "broken JSON": 2,
        "a JSON list where an object was expected": 1,
        "a JSON str where an object was expected": 1,
        "no readable field 'text', 'content', 'messages', 'prompt'+'completion'": 1,
    }


def test_deep_nesting_is_broken_json_not_a_crash(read):
    texts, counted = read(b"[" * 200_000 + b'\n{"text": "after"}\n')
    assert texts == ["after"]
    assert counted == {"broken JSON": 1}


def test_marks_and_latin_1_lines_are_read(read):
    data = "\ufeff".encode() + b'{"text": "one"}\r\n' + '{"text": "déjà"}'.encode("latin-1")
    assert read(data) == (["one", "déjà"], {"not UTF-8: read as Latin-1": 1})


def test_a_huge_line_is_passed_over_without_being_read_whole(tmp_path):
    file, log = tmp_path / "file.jsonl", ReadingLog()
    file.write_bytes(b'{"text": "' + b"x" * 5_000_000 + b'"}\n{"text": "after"}\n')
    found = read_json_lines(file, name="file.jsonl", log=log, max_line_bytes=2**20)
    assert [document.text for document in found] == ["after"]
    assert [(one.reason, one.count) for one in log.skipped_remarks()] == [("line longer than 1 MiB", 1)]


def test_gzip_is_read_and_a_file_cut_short_gives_what_it_has(read):
    lines = b"".join(json.dumps({"text": f"text {number} " * 50}).encode() + b"\n" for number in range(2000))
    whole = gzip.compress(lines)
    assert len(read(whole, name="file.jsonl.gz")[0]) == 2000
    texts, counted = read(whole[: len(whole) // 2], name="file.jsonl.gz")
    assert 0 < len(texts) < 2000
    assert list(counted) == ["broken gzip file from here on (EOFError)"]


def test_a_file_only_called_gzip_is_counted(read):
    assert read(b"plain", name="file.jsonl.gz")[1] == {"broken gzip file from here on (BadGzipFile)": 1, "empty": 1}


def read_table(path):
    log = ReadingLog()
    return [document.text for document in read_parquet(path, name=path.name, log=log)], remarks(log)


def test_parquet_columns_are_read_in_batches(tmp_path):
    file = tmp_path / "table.parquet"
    texts = [f"text {number}" for number in range(700)]
    pq.write_table(pa.table({"text": texts, "other": range(700)}), file)
    assert read_table(file) == (texts, {})


def test_parquet_chats_are_rendered(tmp_path):
    file = tmp_path / "table.parquet"
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    pq.write_table(pa.table({"messages": [chat]}), file)
    assert read_table(file) == (["<｜User｜>hi<｜Assistant｜>hello"], {})


def test_parquet_rows_without_text_are_counted(tmp_path):
    file = tmp_path / "table.parquet"
    pq.write_table(pa.table({"text": ["one", None]}), file)
    texts, counted = read_table(file)
    assert texts == ["one"]
    assert list(counted.values()) == [1]


@pytest.mark.parametrize("data", [b"", b"PAR1 not really PAR1"])
def test_a_broken_parquet_file_is_counted(tmp_path, data):
    file = tmp_path / "table.parquet"
    file.write_bytes(data)
    texts, counted = read_table(file)
    assert texts == []
    assert list(counted) == ["broken Parquet file from here on (ArrowInvalid)"]


def test_a_parquet_file_without_a_known_column_is_counted(tmp_path):
    file = tmp_path / "table.parquet"
    pq.write_table(pa.table({"number": [1]}), file)
    assert list(read_table(file)[1]) == ["no column 'text', 'content', 'messages', 'prompt', 'completion'"]
