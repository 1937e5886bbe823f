"""The other processes of a run, and what is done when one is gone.

A process that is killed leaves the others waiting for it in a collective operation,
some for minutes. So every process shows a sign of life every two seconds, in the store
of JAX's coordinator, and one that has shown none for `PATIENCE` seconds is named before
the others end, too. What they had not saved is lost; the last checkpoint is complete.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxlab.training.telling import tell

INTERVAL = 2.0
"""Seconds between two signs of life."""

PATIENCE = 12.0
"""Seconds without one after which a process counts as gone."""

SIGNS = "jaxlab/alive"


@contextlib.contextmanager
def watched_peers(advice: str) -> Iterator[None]:
    """End this process, with exit status 1 and a sentence, if another one is gone.

    Args:
        advice: what the user can do then, as a sentence.
    """
    if jax.process_count() == 1:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(advice, ended), name="peers", daemon=True
    )
    thread.start()
    try:
        yield
    except jax.errors.JaxRuntimeError:
        # A broken connection, likely; the thread finds out whose, and ends the process.
        thread.join(PATIENCE + 3 * INTERVAL)
        raise
    finally:
        ended.set()
        thread.join(INTERVAL)


def _watch(advice: str, ended: threading.Event) -> None:
    me, client = jax.process_index(), ocp.multihost.get_jax_distributed_client()
    began = time.monotonic()
    seen: dict[int, tuple[Any, float]] = {  # the last sign of each, and when it came
        process: (None, began) for process in range(jax.process_count())
    }
    about = {"host": socket.gethostname(), "pid": os.getpid()}
    number = 0
    while not ended.wait(INTERVAL):
        number += 1
        sign = json.dumps(about | {"number": number})
        now = time.monotonic()
        try:
            client.key_value_set(f"{SIGNS}/{me}", sign, allow_overwrite=True)
            signs = client.key_value_dir_get(SIGNS)
        except jax.errors.JaxRuntimeError:  # the coordinator does not answer
            signs = [(f"{SIGNS}/{me}", sign)]
        for key, sign in signs:
            process = int(key.rpartition("/")[2])
            if sign == LAST:
                seen.pop(process, None)
            elif process in seen and seen[process][0] != sign:
                seen[process] = sign, now
        gone = [p for p, (_, when) in seen.items() if now - when > PATIENCE]
        if gone and not ended.is_set():
            _end(gone, seen, advice)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f"{SIGNS}/{me}", LAST, allow_overwrite=True)


LAST = "ended"
"""The sign of a process whose run has ended."""


def _end(gone: list[int], seen: dict[int, tuple[Any, float]], advice: str) -> None:
    def named(process: int) -> str:
        sign, _ = seen[process]
        if sign is None:
            return f"process {process}"
        about = json.loads(sign)
        return f"process {process} ({about['pid']} on {about['host']})"

    which = ", ".join(map(named, gone))
    verb = "has" if len(gone) == 1 else "have"
    tell(
        f"error: {which} of {jax.process_count()} {verb} shown no sign of life for "
        f"{PATIENCE:.0f} s, so the run ends. {advice}\n",
        sys.stderr,
    )
    os._exit(1)
