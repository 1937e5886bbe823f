"""Two runs in one directory: the second is refused, and waits for nothing."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from jaxlab.checkpoint import CheckpointError
from jaxlab.training import SearchConfig, train
from jaxlab.training.lock import sole_writer
from jaxlab.training.problems import PolicySearch

HOLDER = """
import pathlib, sys, time
from jaxlab.training.lock import sole_writer
with sole_writer(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held(tmp_path):
    """A run's directory, and the process that has it."""
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(run)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    yield run, child
    child.kill()
    child.communicate()


def test_the_second_run_is_refused_until_the_first_is_gone(held):
    run, child = held
    host = socket.gethostname()
    cfg = SearchConfig(name=run.name, directory=str(run.parent), task=PolicySearch())
    for resume in (False, True):
        message = f"is being written by process {child.pid} on {host}. Wait for it"
        with pytest.raises(CheckpointError, match=message):
            train(cfg, resume=resume)
    assert [path.name for path in run.iterdir()] == ["lock"]
    child.send_signal(signal.SIGKILL)
    child.wait()
    with sole_writer(run):
        assert f"process {os.getpid()} on" in (run / "lock").read_text()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match="file/run cannot be written: .*Not a dir"
    ):
        with sole_writer(tmp_path / "file" / "run"):
            pass
