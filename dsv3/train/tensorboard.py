"""Event files for TensorBoard, written in line.

torch's SummaryWriter writes from a thread of its own, where a full disk is a traceback on the screen and an error
nobody can catch. The format is simple enough without it: one checksummed record for each event.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any


class Board:
    """Appends scalars and texts to a new event file in a folder."""

    def __init__(self, folder: Path, *, resumed_step: int) -> None:
        """Begin a file; viewers then forget what other files in the folder say of steps after `resumed_step`."""
        # Imported here, for the sake of everything that imports training and draws nothing.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        self._tensor = lambda text: TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        self._metadata = create_summary_metadata(display_name="", description="")
        folder.mkdir(parents=True, exist_ok=True)
        # Viewers read the files of a folder in the order of their names; the time in it makes that the order of runs.
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=resumed_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add_scalars(self, values: dict[str, float], *, step: int) -> None:
        """Add numbers by tag."""
        parts = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(self._event(step=step, summary=self._summary(value=parts)))

    def add_text(self, tag: str, text: str, *, step: int) -> None:
        """Add a text."""
        part = self._summary.Value(tag=tag, tensor=self._tensor(text), metadata=self._metadata)
        self._write(self._event(step=step, summary=self._summary(value=[part])))

    def force_to_disk(self) -> None:
        """Wait until the disk has everything."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._file.flush()
