import sys
from types import SimpleNamespace

import pytest

from dsv3.data.document import ReadingLog
from dsv3.data.hub import hub_documents
from dsv3.errors import DataError, MissingExtraError


@pytest.fixture
def stream(monkeypatch):
    """Stand in for the library: records what was asked for, and counts how far its stream has been read."""
    state = SimpleNamespace(asked=None, read=0, records=[])

    def load_dataset(path, **options):
        state.asked = (path, options)

        def records():
            for record in state.records:
                state.read += 1
                if isinstance(record, Exception):
                    raise record
                yield record

        return records()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return state


def test_records_are_read_as_they_arrive(stream):
    stream.records = [{"text": f"text {number}"} for number in range(100)]
    documents = hub_documents("hf://owner/name", log=ReadingLog())
    assert next(documents).text == "text 0"
    assert next(documents).name == "owner/name#2"
    assert stream.read == 2
    assert stream.asked == ("owner/name", {"name": None, "split": "train", "streaming": True})


def test_configuration_and_split_are_passed_on(stream):
    list(hub_documents("hf://owner/name?config=zh&split=validation", log=ReadingLog()))
    assert stream.asked == ("owner/name", {"name": "zh", "split": "validation", "streaming": True})


def test_records_without_text_are_counted(stream):
    stream.records = [{"text": "a"}, {"label": 3}]
    log = ReadingLog()
    assert len(list(hub_documents("hf://name", log=log))) == 1
    assert log.skipped_remarks()[0].count == 1


@pytest.mark.parametrize("failure", [ConnectionError("no route"), ValueError("unknown split"), RuntimeError("gated")])
def test_a_stream_that_breaks_off_is_an_error_with_advice(stream, failure):
    stream.records = [{"text": "a"}, failure]
    with pytest.raises(DataError, match=r"cannot read hf://name .*check the name"):
        list(hub_documents("hf://name", log=ReadingLog()))


@pytest.mark.parametrize("path", ["hf://", "hf://name?splt=train", "hf://?split=train"])
def test_a_path_that_cannot_be_obeyed_is_refused(stream, path):
    with pytest.raises(DataError, match="write hf://NAME"):
        list(hub_documents(path, log=ReadingLog()))


def test_without_the_library_the_install_line_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"reading hf://name .* pip install 'dsv3\[data\]'"):
        list(hub_documents("hf://name", log=ReadingLog()))
