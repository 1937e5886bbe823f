"""One run at a time in a directory."""

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import jax

from jaxlab.checkpoint import CheckpointError
from jaxlab.checkpoint.processes import gather_json

FILE = "lock"  # its text names the process that has or had it

log = logging.getLogger(__name__)


@contextlib.contextmanager
def sole_writer(run: Path) -> Iterator[None]:
    """Keep other runs out of a run's directory, which is made if missing.

    The system releases the lock with the process, however that ends, and holds it for
    other hosts on a shared file system too. Process 0 takes it for all of a run.

    Args:
        run: the directory.

    Raises:
        CheckpointError: another process has it, or the directory cannot be made.
    """
    with contextlib.ExitStack() as stack:
        reason = None
        if jax.process_index() == 0:
            try:
                run.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(run / FILE, "a+"))
                reason = _taken(run, file)
            except OSError as error:
                reason = f"{run} cannot be written: {error}."
        if reason := gather_json(reason)[0]:
            raise CheckpointError(reason)
        yield


def _taken(run: Path, file: TextIO) -> str | None:
    """Take the lock, or say who has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows both
        file.seek(0)
        return (
            f"{run} is being written by {file.read() or 'another process'}. Wait for "
            "it or stop it, or give this run another name."
        )
    except OSError as error:
        log.warning(
            "%s cannot be locked (%s): do not start a second run there.", run, error
        )
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return None
