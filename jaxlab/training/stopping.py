"""When a run stops before its end: signals, and the minutes it was given."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Protocol

import jax
from jax.experimental import multihost_utils


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

    With several processes JAX's own handler makes them stop at the same step.
    """
    received: list[str] = []
    before = {}

    def receive(number, _frame):
        received.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    in_main = threading.current_thread() is threading.main_thread()
    if in_main and jax.process_count() == 1:
        before = {n: signal.signal(n, receive) for n in SIGNALS.values()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
