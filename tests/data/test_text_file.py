import codecs

import pytest

from dsv3.data.document import ReadingLog
from dsv3.data.text_file import looks_binary, read_text_file


@pytest.fixture
def read(tmp_path):
    """Return the texts in a file of the given bytes, and what was remarked: reason -> count."""

    def read_bytes(data, **options):
        (tmp_path / "file.txt").write_bytes(data)
        log = ReadingLog()
        documents = list(read_text_file(tmp_path / "file.txt", name="file.txt", log=log, **options))
        remarks = {remark.reason: remark.count for remark in (*log.skipped_remarks(), *log.changed_remarks())}
        return [document.text for document in documents], remarks

    return read_bytes


def test_utf8_is_read_as_it_is(read):
    assert read("é 河\r\n\u2028".encode()) == (["é 河\r\n\u2028"], {})


def test_a_byte_order_mark_is_taken_off(read):
    assert read(codecs.BOM_UTF8 + "é".encode()) == (["é"], {})


def test_latin_1_is_decoded_and_counted(read):
    assert read("déjà vu".encode("latin-1")) == (["déjà vu"], {"not UTF-8: read as Latin-1": 1})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_wide_encodings_are_read_by_their_mark(read, encoding):
    texts, remarks = read("déjà 河\n".encode(encoding))
    assert texts == ["déjà 河\n"]
    assert list(remarks) == [f"{encoding.upper()}: read by its byte order mark"]


def test_a_broken_wide_file_is_skipped_and_counted(read):
    texts, remarks = read(codecs.BOM_UTF16_LE + "abc".encode("utf-16-le") + b"\x00")
    assert texts == []
    assert list(remarks) == ["marked as UTF-16 but not valid as such from some place on"]


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n\0\0", bytes(range(256)) * 8, b"\x7fELF\x02\x01\x01" + bytes(99)])
def test_binary_files_are_skipped_and_counted(read, data):
    assert read(data) == ([], {"binary file": 1})


def test_an_empty_file_is_skipped_and_counted(read):
    assert read(b"") == ([], {"empty": 1})


@pytest.mark.parametrize("data", [b"\x1b[31mred\x1b[0m and much more text in a log file", b"page\x0cbreak\ttab\r\n"])
def test_a_few_control_characters_do_not_make_a_file_binary(data):
    assert not looks_binary(data)


def test_a_long_file_is_cut_at_line_ends_and_nothing_is_lost(read):
    text = "".join(f"line {number} 河流\n" for number in range(100))
    texts, remarks = read(text.encode(), piece_bytes=50)
    assert len(texts) > 10
    assert "".join(texts) == text
    assert all(piece.endswith("\n") for piece in texts)
    assert remarks == {}


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_a_line_that_never_ends_is_cut_between_characters(read, shift):
    text = "x" * shift + "河" * 200
    texts, remarks = read(text.encode(), piece_bytes=20)
    assert len(texts) > 1
    assert "".join(texts) == text
    assert remarks == {}
