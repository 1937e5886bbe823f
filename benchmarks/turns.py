"""Time contestants that take turns, and summarise the times.

All of them run in every turn, so that other load affects them equally. Ratios and
differences are computed within a turn, medians and quartiles over the turns.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np


def run(program):
    """Run a compiled program and wait for its results."""
    function, arguments = program
    return jax.block_until_ready(function(*arguments))


def timed(program) -> Callable[[], float]:
    """A function that runs the program once and returns the seconds it took."""

    def seconds():
        start = time.perf_counter()
        run(program)
        return time.perf_counter() - start

    return seconds


def alternate(functions: dict[str, Callable[[], float]], turns: int):
    """The seconds of every turn, after one turn for warming up."""
    for function in functions.values():
        function()
    seconds = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            seconds[name].append(function())
    return seconds


def summarise(seconds: dict[str, list[float]], baseline: str = "xla") -> dict:
    """Medians and quartiles of the times, and of their ratios to the baseline's."""
    base = np.array(seconds[baseline])
    return {
        name: {
            "milliseconds": quartiles(1e3 * np.array(x)),
            "ratio": quartiles(np.array(x) / base),
        }
        for name, x in seconds.items()
    }


def quartiles(x: np.ndarray) -> dict:
    """The median and the quartiles."""
    low, middle, high = np.quantile(x, (0.25, 0.5, 0.75))
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


def power(sizes: Sequence[int], values: np.ndarray) -> np.ndarray:
    """p of the least-squares fit of values ~ size^p.

    Args:
        sizes: at least two.
        values: ``[size, ...]``; each column, such as a turn, has its own fit.

    Raises:
        ValueError: a value is not above 0.
    """
    if not np.min(values) > 0:
        raise ValueError(
            f"{np.min(values)} is among the values, which must all be above 0 to be a "
            "power of the size; measure longer turns."
        )
    return np.polyfit(np.log(sizes), np.log(values), 1)[0]


def report(case, summary):
    print(case)
    for name, x in summary.items():
        print(
            f"  {name:45s} {x['milliseconds']['median']:9.1f} ms "
            f"{x['ratio']['median']:7.2f} x {x.get('temporary_MB', '')!s:>8}",
            flush=True,
        )


class Peer:
    """A child process under another Python that answers requests.

    Args:
        python: path of that Python.
        script: reads one JSON request per line, and answers each with one line.

    Raises:
        ValueError: that Python cannot be started.
    """

    def __init__(self, python: str, script: pathlib.Path):
        self.command = [python, str(script)]
        try:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                # Idle threads must not spin on the cores of the next contestant.
                env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
            )
        except OSError as error:
            raise ValueError(
                f"{python} cannot be started ({error.strerror}); give the path of the "
                f"Python that is to run {script.name}, or leave it out."
            ) from error
        assert self.process.stdin and self.process.stdout
        self.requests, self.answers = self.process.stdin, self.process.stdout

    def ask(self, **request) -> dict:
        answer = ""
        with contextlib.suppress(BrokenPipeError):  # the process has ended
            self.requests.write(json.dumps(request) + "\n")
            self.requests.flush()
            answer = self.answers.readline()
        if not answer:
            raise RuntimeError(
                f"{' '.join(self.command)} ended at the request {request}; run it by "
                "hand and type the request to see why."
            )
        return json.loads(answer)
