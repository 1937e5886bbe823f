"""TensorBoard's record of a run.

The writer that tensorboardX offers works in a thread: on a full disk the thread dies,
its queue fills, and the run waits for ever. Here `write` has written, or it raises.
"""

import itertools
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from jaxlab.training.record_file import RecordFile

VERSION = "brain.Event:2"  # what TensorBoard expects of the first event

# Protocol buffers make their classes when they are imported.
_messages: Any = event_pb2
Event, SessionLog = _messages.Event, _messages.SessionLog

_number = itertools.count()  # two files may be opened within a second


class EventFile:
    """A new file of scalars in a directory.

    Args:
        directory: where TensorBoard looks for it.
        purge_step: the first step that TensorBoard hides of earlier files.

    Raises:
        OSError: the file cannot be made; and, from `write`, the values cannot be
            written, of which then none is.
    """

    def __init__(self, directory: Path, purge_step: int | None = None):
        name = f"events.out.tfevents.{int(time.time())}.{os.getpid()}.{next(_number)}"
        self._file = RecordFile(directory / name)
        self._first = [Event(file_version=VERSION, wall_time=time.time())]
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._first.append(Event(step=purge_step, file_version=VERSION))
            self._first.append(Event(step=purge_step, session_log=start))
            self.write(purge_step, {})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of one step."""
        now = time.time()
        events = [
            Event(step=step, wall_time=now, summary=scalar(name, value))
            for name, value in values.items()
        ]
        self._file.append(b"".join(map(_framed, self._first + events)))
        self._first = []

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _framed(event: Any) -> bytes:
    """A record of TensorFlow's format: length, its checksum, event, its checksum."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    """The masked CRC-32C of TensorFlow's record format."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
