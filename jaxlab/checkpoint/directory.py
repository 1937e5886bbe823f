"""The directory of a run's steps, and the damaged or unfinished ones in it."""

import contextlib
import logging
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath  # pathlib for file systems and buckets, orbax's own
from jax.experimental import multihost_utils

TEMPORARY = ".orbax-checkpoint-tmp"

log = logging.getLogger(__name__)


def resolved(directory: str | Path) -> epath.Path:
    """The absolute path of a directory, or a bucket's address as it is."""
    path = epath.Path(directory)
    return path if "://" in str(directory) else path.absolute()


def complete_steps(directory: epath.Path) -> list[int]:
    """The steps in a directory, without one that is still being written."""
    if not directory.is_dir():
        return []
    return ocp.utils.checkpoint_steps(directory)


def move_aside(
    directory: epath.Path, failures: list[tuple[int, str]], used: int
) -> None:
    """Rename each damaged step to `corrupt-<step>`, with a warning.

    Args:
        directory: of the steps.
        failures: the damaged steps, each with what is wrong with it.
        used: the step that is used instead.
    """
    if jax.process_index() == 0:
        for step, reason in failures:
            aside = _free_name(directory, f"corrupt-{step}")
            (directory / str(step)).rename(aside)
            log.warning(
                "Step %d in %s is damaged: %s. It has been moved to %s, and step "
                "%d is used instead.",
                step,
                directory,
                reason,
                aside.name,
                used,
            )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jaxlab-checkpoint-move-aside")


def remove_unfinished(directory: epath.Path, step: int | None) -> None:
    """Remove the temporary directory of a failed save.

    The threads that write the other arrays notice the failure a little later and may
    put files back; what is left after these attempts is removed before the next save.
    """
    for _ in range(20):
        for path in directory.glob(f"{step}{TEMPORARY}*"):
            with contextlib.suppress(OSError):
                path.rmtree()
        time.sleep(0.05)
        if not any(directory.glob(f"{step}{TEMPORARY}*")):
            return


def _free_name(directory: epath.Path, name: str) -> epath.Path:
    path, n = directory / name, 1
    while path.exists():
        n += 1
        path = directory / f"{name}-{n}"
    return path
