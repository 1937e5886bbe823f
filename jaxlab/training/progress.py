"""The progress of a run, in one line."""

import math
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

import jax

from jaxlab.training.telling import tell


class Progress:
    """The state of a run in one line: `step 120/600  loss 2.134  18.2k tok/s ...`.

    On a terminal the line is rewritten; elsewhere one is printed every `interval`
    seconds and at the end. Only process 0 prints.

    Args:
        total_steps: where the run ends.
        figure: the name of what is shown of each step.
        flops_per_token: forward and backward, of the model (no recomputation).
        peak_flops: sum over all devices; without it or flops_per_token the model-FLOP
          utilisation (MFU) is left out.
        interval: seconds between lines that are not rewritten.
        window: updates over which the speed is measured.
        stream: by default sys.stdout.
        clock: seconds from any origin.
    """

    def __init__(
        self,
        total_steps: int,
        figure: str = "loss",
        *,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        interval: float = 10.0,
        window: int = 20,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps = total_steps
        self.figure = figure
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.interval = interval
        self.stream = stream or sys.stdout
        self.clock = clock
        self._rewrites = self.stream.isatty()
        self._silent = jax.process_index() != 0
        self._recent = deque(maxlen=window + 1)  # (seconds, step, tokens)
        self._printed = -math.inf
        self._line = ""
        self._stop_waiting: Callable[[], None] = lambda: None

    def update(self, step: int, value: float, tokens: int | None = None) -> None:
        """Show the figure of a step; the first call starts the clock.

        Args:
            step: updates made.
            value: the figure of the last one.
            tokens: read by all steps so far, over all devices; None shows the seconds
                of a step in place of a speed in tokens.
        """
        self._stop_waiting()
        now = self.clock()
        self._recent.append((now, step, tokens))
        self._line = "  ".join([f"step {step}/{self.total_steps}", *self._parts(value)])
        if self._silent:
            return
        if self._rewrites:
            width = shutil.get_terminal_size().columns - 1
            tell(f"\r{self._line[:width]}\x1b[K", self.stream)
        elif now - self._printed >= self.interval or step >= self.total_steps:
            tell(self._line + "\n", self.stream)
            self._printed = now

    def waiting(self, what: str) -> None:
        """Show what the first step waits for, with a clock, until the next call."""
        if self._silent:
            return
        over, began = threading.Event(), self.clock()

        def show():
            while True:
                text = f"{what}, {self.clock() - began:.0f} s"
                rewritten = f"\r{text}\x1b[K"
                tell(rewritten if self._rewrites else text + "\n", self.stream)
                if over.wait(1.0 if self._rewrites else self.interval):
                    return

        thread = threading.Thread(target=show, name="progress", daemon=True)
        thread.start()

        def stop():
            self._stop_waiting = lambda: None
            over.set()
            thread.join()
            if self._rewrites:
                tell("\r\x1b[K", self.stream)

        self._stop_waiting = stop

    def message(self, text: str) -> None:
        """Print a text on a line of its own; a rewritten line continues below it."""
        self._stop_waiting()
        if self._silent:
            return
        if self._rewrites:
            text = f"\r{text}\x1b[K\n{self._line}"
        else:
            text += "\n"
        tell(text, self.stream)

    def close(self) -> None:
        """End a rewritten line, so that what follows starts on a new one."""
        self._stop_waiting()
        if self._rewrites and self._line and not self._silent:
            tell("\n", self.stream)
        self._line = ""

    def _parts(self, value: float) -> list[str]:
        parts = [f"{self.figure} {float(value):.3f}"]
        start, first, before = self._recent[0]
        end, last, tokens = self._recent[-1]
        if end <= start or last <= first:
            return parts
        steps_per_second = (last - first) / (end - start)
        if tokens is None or before is None:
            parts.append(f"{1 / steps_per_second:.2g} s/step")
        else:
            tokens_per_second = (tokens - before) / (end - start)
            parts.append(f"{_short(tokens_per_second)} tok/s")
            if self.flops_per_token is not None and self.peak_flops is not None:
                mfu = tokens_per_second * self.flops_per_token / self.peak_flops
                parts.append(f"MFU {mfu:.0%}" if mfu >= 0.1 else f"MFU {mfu:.1%}")
        left = (self.total_steps - last) / steps_per_second
        parts.append(f"{_duration(left)} left")
        return parts


def _short(x: float) -> str:
    """Three digits and a unit: 950, 18.2k, 1.25M."""
    for unit in ("", "k", "M", "G"):
        if x < 999.5 or unit == "G":
            digits = 0 if unit == "" or x >= 99.95 else 1 if x >= 9.995 else 2
            return f"{x:.{digits}f}{unit}"
        x /= 1000
    raise AssertionError("unreachable")


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
