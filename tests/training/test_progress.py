"""The progress line: speed, time left, terminals and files."""

import io
import itertools
import threading

import pytest

from jaxlab.training.progress import Progress, _duration, _short


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_line():
    seconds = iter([0.0, 10.0])
    stream = io.StringIO()
    progress = Progress(
        600,
        flops_per_token=6e6,
        peak_flops=4e11,
        interval=0.0,
        stream=stream,
        clock=lambda: next(seconds),
    )
    progress.update(20, 3.0, 100_000)
    progress.update(120, 2.1341, 100_000 + 100 * 2048)
    first, second = stream.getvalue().splitlines()
    assert first == "step 20/600  loss 3.000"  # one time gives no speed
    # 100 steps in 10 s are 20480 tok/s, 1.2288e11 FLOP/s; 480 steps are left.
    assert second == "step 120/600  loss 2.134  20.5k tok/s  MFU 31%  0:48 left"


def test_without_a_peak_there_is_no_mfu_and_speed_is_recent():
    clock = itertools.chain([0.0, 100.0], itertools.count(101.0))
    stream = io.StringIO()
    progress = Progress(
        1000,
        flops_per_token=1.0,
        interval=0.0,
        window=3,
        stream=stream,
        clock=lambda: next(clock),
    )
    for step in range(6):  # the first step takes 100 s, the later ones 1 s
        progress.update(step, 1.0, step * 1_000_000)
    last = stream.getvalue().splitlines()[-1]
    assert last == "step 5/1000  loss 1.000  1.00M tok/s  16:35 left"


def test_tokens_are_those_of_the_steps_as_they_were():
    """10, then 10, then 80 tokens, in a second each."""
    clock, stream = itertools.count(0.0), io.StringIO()
    progress = Progress(9, interval=0.0, stream=stream, clock=lambda: next(clock))
    for step, tokens in enumerate((10, 20, 100), 1):
        progress.update(step, 1.0, tokens)
    assert [line.split("  ")[2] for line in stream.getvalue().splitlines()[1:]] == [
        "10 tok/s",
        "45 tok/s",
    ]


def test_elsewhere_than_on_a_terminal_a_line_an_interval():
    clock = itertools.count(0.0, 3.0)
    stream = io.StringIO()
    progress = Progress(20, interval=10.0, stream=stream, clock=lambda: next(clock))
    for step in range(1, 21):
        progress.update(step, 1.0, step)
    progress.message("held-out loss 1.2")
    progress.close()
    lines = stream.getvalue().splitlines()
    shown = [line.split()[1] for line in lines[:-1]]
    assert shown == ["1/20", "5/20", "9/20", "13/20", "17/20", "20/20"]
    assert lines[-1] == "held-out loss 1.2" and "\r" not in stream.getvalue()


def test_on_a_terminal_the_line_is_rewritten(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    clock = itertools.count(0.0)
    stream = Terminal()
    progress = Progress(9, stream=stream, clock=lambda: next(clock))
    progress.update(1, 1.0, 1)
    progress.update(2, 1.0, 2)
    progress.message("saved")
    progress.close()
    parts = stream.getvalue().split("\r")
    assert parts[1] == "step 1/9  loss 1.000\x1b[K"
    assert parts[2] == "step 2/9  loss 1.000  1 tok/s\x1b[K"  # cut to the width
    assert parts[3].startswith("saved\x1b[K\nstep 2/9")
    assert stream.getvalue().endswith("\n")


@pytest.mark.parametrize(
    "x, text",
    [
        (0.4, "0"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (9_994, "9.99k"),
        (9_996, "10.0k"),
        (99_960, "100k"),
        (1.25e6, "1.25M"),
        (3.2e12, "3200G"),
    ],
)
def test_three_digits(x, text):
    assert _short(x) == text


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0:00"), (59.6, "1:00"), (102, "1:42"), (7390, "2:03:10")]
)
def test_durations(seconds, text):
    assert _duration(seconds) == text


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_a_clock_runs_until_the_first_step(stream):
    """The clock is asked once for its start, and once for each time it is shown."""
    shown = threading.Event()
    times = iter([100.0, 100.0, 103.0])

    def clock():
        if (now := next(times, 107.0)) == 103.0:
            shown.set()
        return now

    progress = Progress(2, interval=0.01, stream=stream, clock=clock)
    progress.waiting("compiling")
    assert shown.wait(10)
    progress.update(1, 2.0)
    progress.close()
    text = stream.getvalue()
    for line in ("compiling, 0 s", "compiling, 3 s", "step 1/2  loss 2.000"):
        assert line in text
    assert text.rindex("step") > text.rindex("compiling")
    assert not any(t.name == "progress" for t in threading.enumerate())
