"""What a run says on its way: a run is worth more than its words."""

import contextlib
import logging
import os
import sys
from typing import TextIO

log = logging.getLogger(__name__)


def tell(text: str, stream: TextIO | None = None) -> None:
    """Write a text as it is, without a line's end, and never fail.

    Characters that the stream's encoding lacks are replaced. If the stream is closed,
    as by ``| head``, or on a full disk, a warning says so and the rest is dropped.

    Args:
        text: what to write.
        stream: by default sys.stdout.
    """
    stream = stream or sys.stdout
    if stream is None:  # a process without an output
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except (OSError, ValueError) as error:  # ValueError: a closed file
        log.warning("Nothing more is shown (%s); the run goes on.", error)
        _drop(stream)


def _drop(stream: TextIO) -> None:
    """Let what the stream still holds, and what follows, go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
