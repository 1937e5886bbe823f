"""Files that a run appends to, and that hold whole records whatever happens."""

import errno
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


class RecordFile:
    """A file to which whole records are appended, none of them held back in memory.

    Args:
        path: made if missing.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "ab", buffering=0)

    def append(self, record: bytes) -> None:
        """Append a record. If the file was moved or deleted, another begins.

        Raises:
            OSError: the record could not be written whole; then none of it is there.
        """
        if not self._is_in_place():
            file = open(self.path, "ab", buffering=0)
            log.warning("%s is gone; a new one begins.", self.path)
            self.close()
            self._file = file
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(record) != len(record):
                raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        except OSError:
            os.ftruncate(self._file.fileno(), size)
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _is_in_place(self) -> bool:
        """Whether the open file is still the one of that name."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self._file.fileno()))
