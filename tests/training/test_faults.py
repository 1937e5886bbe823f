"""A run that is broken on purpose, leg by leg, ends as one that nothing happened to.

A leg is a process that starts or resumes the run, what is done to it, how it must end
and what it must say. After the last one the figures of all steps are those of a run
without faults, to the bit, and what it left is a run's directory and nothing else.
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = pathlib.Path(__file__).with_name("faulty_run.py")
STEPS = 40
PATIENCE = 120  # seconds until a process counts as hung


class Run:
    """The run's directory, and the process that works in it."""

    def __init__(self, directory: pathlib.Path, log: pathlib.Path | None = None):
        self.directory = directory / "run"
        self.log = log or directory / "said"
        self.process: subprocess.Popen | None = None

    def start(self, *options: str, shell: str = "{}") -> None:
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), str(CONFIG)]
        command += ["--directory", str(self.directory.parent), "--resume", *options]
        with open(self.log, "w") as output:
            self.process = subprocess.Popen(
                ["bash", "-c", shell.format('exec "$0" "$@"'), *command],
                stdout=output,
                stderr=output,
                env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
            )

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait for something, or for the end of the process."""
        assert self.process is not None
        end = time.monotonic() + PATIENCE
        while not happened() and self.process.poll() is None:
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.002)

    def until_step(self, step: int) -> None:
        self.until(lambda: step in self.losses())

    def finish(self) -> tuple[int, str]:
        """The exit status and all that was said."""
        assert self.process is not None
        return self.process.wait(PATIENCE), self.log.read_text()

    def losses(self) -> dict[int, float]:
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines(True) if path.exists() else []
        read = [json.loads(line) for line in lines if line.endswith("\n")]
        return {x["step"]: x["train/loss"] for x in read if "train/loss" in x}

    def saved(self) -> list[int]:
        names = (path.name for path in (self.directory / "checkpoints").glob("*"))
        return sorted(int(name) for name in names if name.isdigit())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The losses of a run without faults."""
    run = Run(tmp_path_factory.mktemp("undisturbed"))
    run.start()
    status, said = run.finish()
    assert status == 0, said
    losses = run.losses()
    assert list(losses) == list(range(1, STEPS + 1))
    return losses


# What is done to a process that has been started --------------------------------------


def nothing(run: Run) -> None:
    """Let it run to its end."""


def signalled(name: str, when: Callable[[Run], None]) -> Callable[[Run], None]:
    def act(run: Run) -> None:
        when(run)
        assert run.process is not None
        run.process.send_signal(getattr(signal, name))

    return act


def importing(run: Run) -> None:
    """JAX's libraries are mapped, and much is imported after them."""
    assert run.process is not None
    maps = pathlib.Path(f"/proc/{run.process.pid}/maps")
    run.until(lambda: "jaxlib" in maps.read_text())


def compiling(run: Run) -> None:
    run.until(lambda: "compiling the step" in run.log.read_text())


def at_step(step: int) -> Callable[[Run], None]:
    return lambda run: run.until_step(step)


def in_a_save(run: Run) -> None:
    newest = max(run.saved(), default=0)
    folder = run.directory / "checkpoints"
    run.until(
        lambda: any(
            int(path.name.partition(".")[0]) > newest
            for path in folder.glob("*.orbax-checkpoint-tmp*")
        )
    )


class Leg(NamedTuple):
    """What happens to one process, and how it must end."""

    act: Callable[[Run], None]
    status: int
    says: str = ""
    options: tuple[str, ...] = ()
    shell: str = "{}"  # {} is the command


LEGS = {
    "Ctrl-C while it imports": Leg(signalled("SIGINT", importing), 130, "Stopped"),
    "terminated while it imports": Leg(signalled("SIGTERM", importing), 143),
    "Ctrl-C while it compiles": Leg(
        signalled("SIGINT", compiling), 0, r"SIGINT: saved step \d"
    ),
    "killed in a save": Leg(signalled("SIGKILL", in_a_save), -9),
    "terminated between steps": Leg(
        signalled("SIGTERM", at_step(12)), 0, r"SIGTERM: saved step 1\d"
    ),
    "killed between steps": Leg(signalled("SIGKILL", at_step(18)), -9),
    "nobody listens": Leg(
        nothing, 0, "Nothing more is shown", ("--steps", "22"), "({}) | head -1"
    ),
    "nothing can be said": Leg(
        nothing, 0, "Nothing more is shown", ("--steps", "24"), "({}) > /dev/full"
    ),
    "it ends": Leg(nothing, 0, "Held-out loss"),
}


@pytest.mark.slow
def test_a_broken_run_ends_as_one_that_was_not(tmp_path, undisturbed):
    run = Run(tmp_path)
    for name, leg in LEGS.items():
        run.start(*leg.options, shell=leg.shell)
        leg.act(run)
        status, said = run.finish()
        if "|" not in leg.shell:
            assert status == leg.status, (name, status, said)
        assert re.search(leg.says, said), (name, said)
        assert "Traceback" not in said, (name, said)
    assert run.losses() == undisturbed
    assert run.saved() == [30, 35, 40]
    left = {path.name.partition(".")[0] for path in run.directory.iterdir()}
    assert left == {"checkpoints", "lock", "metrics", "events", "loss"}
    assert [
        p for p in (run.directory / "checkpoints").iterdir() if "tmp" in p.name
    ] == []


def fill(path: pathlib.Path) -> None:
    """Let a file take what is left of its disk."""
    with open(path, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.slow
def test_a_full_disk_ends_in_a_sentence(small_disk, tmp_path, undisturbed):
    """It fills up in a run; it is full when the run is resumed; then there is room."""
    filling = small_disk / "filling"
    filling.write_bytes(b"")
    run = Run(small_disk, tmp_path / "said")
    run.start()
    run.until(lambda: 5 in run.saved())
    fill(filling)
    full = time.monotonic()
    status, said = run.finish()
    assert status == 1 and time.monotonic() - full < 60
    sentence = r"error: Step 40 could not be saved in .*: the disk is full\. The last"
    assert re.search(sentence, said), said
    assert "Traceback" not in said and len(said.splitlines()) < 80, said

    run.start()
    status, said = run.finish()
    assert status == 1 and "Traceback" not in said, said
    assert "No space left" in said or "the disk is full" in said

    filling.unlink()
    run.start()
    status, said = run.finish()
    assert status == 0, said
    assert run.losses() == undisturbed


@pytest.mark.parametrize("broken", ["run", "run/checkpoints"])
def test_a_place_that_cannot_be_written_is_told_at_once(tmp_path, broken):
    """Before anything is compiled or a corpus is built."""
    path = tmp_path / broken
    path.parent.mkdir(exist_ok=True)
    path.write_text("a file where a directory must be")
    run = Run(tmp_path)
    run.start()
    status, said = run.finish()
    assert status == 1 and "Traceback" not in said
    assert re.search(rf"error: .*{path.name} cannot be written", said), said
    assert "compiling" not in said
