"""The other processes of a run, and what is done when one is gone.

A process that is killed leaves the others waiting for it in a collective operation,
some for minutes. So every process shows a sign of life every two seconds, in the store
of JAX's coordinator, and one that has shown none for `PATIENCE` seconds is named before
the others end, too. What they had not saved is lost; the last checkpoint is complete.
"""

import contextlib
import itertools
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
LAST = "ended"  # the sign of a process whose run has ended well


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
    well = False
    try:
        yield
        well = True
    except jax.errors.JaxRuntimeError:
        # A broken connection, likely; the thread finds out whose, and ends the process.
        thread.join(PATIENCE + 3 * INTERVAL)
        raise
    finally:
        ended.set()
        thread.join(INTERVAL)
        if well:
            _sign(LAST)


def _sign(text: str) -> None:
    client = ocp.multihost.get_jax_distributed_client()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(
            f"{SIGNS}/{jax.process_index()}", text, allow_overwrite=True
        )


def _watch(advice: str, ended: threading.Event) -> None:
    client, answered = ocp.multihost.get_jax_distributed_client(), time.monotonic()
    # The last sign of each process, and when it came.
    seen: dict[int, tuple[Any, float]] = {
        process: (None, answered) for process in range(jax.process_count())
    }
    about = {"host": socket.gethostname(), "pid": os.getpid()}
    for number in itertools.count():
        if ended.wait(INTERVAL):
            return
        now = time.monotonic()
        try:
            _sign(json.dumps(about | {"number": number}))
            signs = client.key_value_dir_get(SIGNS)
            answered = now
        except jax.errors.JaxRuntimeError:  # the coordinator, which is in process 0
            signs = []
        for key, sign in signs:
            process = int(key.rpartition("/")[2])
            if seen[process][0] != sign:
                seen[process] = sign, now
        late = [p for p, (_, when) in seen.items() if now - when > PATIENCE]
        gone = [p for p in late if seen[p][0] != LAST] if answered == now else []
        if now - answered > PATIENCE:
            gone = [0]
        if gone and not ended.is_set():
            _end(gone, seen, advice)


def _end(gone: list[int], seen: dict[int, tuple[Any, float]], advice: str) -> None:
    def named(process: int) -> str:
        sign, _ = seen[process]
        if sign in (None, LAST):
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
