"""When a run stops before its end: signals, and the minutes it was given."""

import collections
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
    """A list that receives the names of stop signals; the second one acts as usual.

    A sentence tells at once that a signal has come, even while a step is compiled or
    computed. With several processes, JAX's own handler of SIGTERM makes them stop at
    the same step; SIGINT to any of them becomes a SIGTERM.
    """
    received: list[str] = []
    alone = jax.process_count() == 1
    watched = SIGNALS.values() if alone else [signal.SIGINT]
    before = {number: signal.getsignal(number) for number in watched}

    def receive(number, _frame):
        received.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may handle signals
        return
    with _told_at_once(received, pass_on=not alone):
        try:
            for number in watched:
                signal.signal(number, receive)
            yield received
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _told_at_once(received: list[str], pass_on: bool) -> Iterator[None]:
    """Tell the first of each signal from a thread.

    Python's own handlers wait until the main thread is back from compiled code, and run
    once for all signals of a kind that came meanwhile.

    Args:
        received: names of the signals whose handlers have run.
        pass_on: whether a SIGINT becomes a SIGTERM.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    ended = threading.Event()

    def watch():
        count = collections.Counter()
        while number := ours.recv(1):
            name = signal.Signals(number[0]).name
            count[name] += 1
            if name in SIGNALS and count[name] == 1:
                tell(
                    f"{name}: the step under way is finished and saved; the same "
                    "again stops without saving.\n"
                )
                if pass_on and name == "SIGINT":
                    os.kill(os.getpid(), signal.SIGTERM)
            if name in SIGNALS and count[name] == 2:
                while name not in received and not ended.wait(0.05):
                    pass
                if not ended.wait(0.2):  # the handler ran for both at once
                    os.kill(os.getpid(), number[0])

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    previous = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(previous)
        theirs.shutdown(socket.SHUT_WR)
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
