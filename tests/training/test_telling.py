"""Words that cannot be shown do not end a run."""

import io
import pathlib
import subprocess
import sys

import pytest

from jaxlab.training.progress import Progress
from jaxlab.training.telling import tell


def test_characters_that_a_terminal_lacks_are_replaced():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    tell("naïve → ok\n", stream)
    assert stream.buffer.getvalue() == b"na?ve ? ok\n"
    progress = Progress(2, stream=stream)
    progress.message("∎")
    assert stream.buffer.getvalue().endswith(b"?\n")


def test_a_closed_stream_is_warned_of_and_no_more(caplog):
    stream = io.StringIO()
    stream.close()
    tell("a", stream)
    assert "Nothing more is shown" in caplog.text


TALKER = """
import logging
from jaxlab.training.telling import tell
logging.basicConfig(format="%(message)s")
for line in range(100_000):
    tell(f"line {line}\\n")
raise SystemExit(7)
"""


def test_a_broken_pipe_costs_words_and_no_status():
    child = subprocess.Popen(
        [sys.executable, "-c", TALKER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stderr is not None
    assert child.stdout.readline() == "line 0\n"
    child.stdout.close()
    said = child.stderr.read()
    child.stderr.close()
    assert child.wait() == 7
    assert said.count("Nothing more is shown") == 1 and "Broken pipe" in said
    assert "Traceback" not in said and "Exception ignored" not in said


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_costs_words_and_no_status():
    with open("/dev/full", "w") as full:
        child = subprocess.run(
            [sys.executable, "-c", TALKER], stdout=full, stderr=subprocess.PIPE
        )
    said = child.stderr.decode()
    assert child.returncode == 7 and said.count("Nothing more is shown") == 1
    assert "No space left" in said and "Traceback" not in said
