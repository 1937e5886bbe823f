"""When a run stops before its end: signals, and the minutes it was given."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Protocol

import jax
from jax.experimental import multihost_utils

from jaxlab.training.telling import tell


class Stoppable(Protocol):
    """The fields of a run's config that say when to stop."""

    @property
    def max_minutes(self) -> float | None: ...

    @property
    def log_every(self) -> int: ...


SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """A list that receives the names of stop signals; the second one kills as usual.

    A sentence tells at once that a signal has come, even while a step is compiled or
    computed. With several processes, JAX's own handler of SIGTERM makes them stop at
    the same step; SIGINT to any of them becomes a SIGTERM.
    """
    received: list[str] = []
    alone = jax.process_count() == 1
    watched = SIGNALS.values() if alone else [signal.SIGINT]
    before = {}

    def receive(number, _frame):
        received.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may handle signals
        return
    with _told_at_once(pass_on=not alone):
        try:
            before = {number: signal.signal(number, receive) for number in watched}
            yield received
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _told_at_once(pass_on: bool) -> Iterator[None]:
    """Tell the first of each signal from a thread.

    Python's own handlers wait until the main thread is back from compiled code.

    Args:
        pass_on: whether a SIGINT becomes a SIGTERM.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def watch():
        told = set()
        while number := ours.recv(1):
            name = signal.Signals(number[0]).name
            if name in SIGNALS and name not in told:
                told.add(name)
                tell(
                    f"{name}: the step under way is finished and saved; the same "
                    "again stops at once.\n"
                )
                if pass_on and name == "SIGINT":
                    os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    previous = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        theirs.close()
        thread.join()
        ours.close()


def why_stop(
    cfg: Stoppable, step: int, started: float, received: list[str]
) -> str | None:
    """A reason to stop before `step`, the same on every process."""
    minutes = (time.monotonic() - started) / 60
    late = cfg.max_minutes is not None and minutes > cfg.max_minutes
    if jax.process_count() > 1:
        if multihost_utils.reached_preemption_sync_point(step):
            return "SIGTERM"
        if cfg.max_minutes is not None and step % cfg.log_every == 0:
            late = bool(multihost_utils.broadcast_one_to_all(late))
        else:
            late = False
    elif received:
        return received[0]
    return f"max_minutes={cfg.max_minutes} have passed" if late else None
