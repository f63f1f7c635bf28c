"""Files are read before they are needed, not far before, and never longer than somebody uses them."""

import threading
import time

import pytest

from dsv3.runtime import read_ahead
from dsv3.runtime.read_ahead import ReadAhead


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """Three files of ten chunks, and how many bytes of them have been read."""
    monkeypatch.setattr(read_ahead, "CHUNK_BYTES", 100)
    files = [tmp_path / str(number) for number in range(3)]
    for file in files:
        file.write_bytes(b"x" * 1000)
    return files


def place_of(reader, *, seconds=0.5):
    """Return how far it has come when it comes no further."""
    time.sleep(seconds)
    frame = reader._place
    time.sleep(0.1)
    assert reader._place == frame
    return frame


def test_it_stays_as_far_ahead_as_it_may_and_no_further(seen):
    with ReadAhead(seen, ahead=250) as reader:
        assert place_of(reader) == 300  # whole chunks
        reader.used(1000)
        assert place_of(reader) == 1300
        reader.used(5000)
        assert place_of(reader) == 3000
    assert not any(thread.name == "reading ahead" for thread in threading.enumerate())


def test_it_stops_when_nobody_uses_the_files_any_more(seen):
    with pytest.raises(ZeroDivisionError), ReadAhead(seen, ahead=1) as reader:
        raise ZeroDivisionError
    assert not reader._thread.is_alive()


def test_a_file_that_cannot_be_read_is_left_to_whoever_uses_it(seen, tmp_path):
    with ReadAhead([tmp_path / "absent", *seen]) as reader:
        reader._thread.join(5)
        assert not reader._thread.is_alive()
