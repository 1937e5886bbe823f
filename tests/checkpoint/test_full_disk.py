"""A full disk costs a save, never the checkpoints before it."""

import errno
import time

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from saved_states import (
    CONFIG,
    abstract,
    entries,
    small_state,
)

from jaxlab.checkpoint import CheckpointError, Checkpoints

# When one array cannot be read, orbax drops the coroutines that read the others; Python
# says so when they are collected, which must happen before another file's tests.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


def test_a_full_disk_is_reported_and_survived(small_disk):
    directory = small_disk / "run"
    # Random bits, which zstd cannot compress.
    noise = np.random.default_rng(0).integers(0, 2**32, (700, 1000), np.uint32)
    small, large = {"x": jnp.asarray(noise[:100])}, {"x": jnp.asarray(noise)}
    with Checkpoints(directory, config=CONFIG) as checkpoints:
        checkpoints.save(1, small)
        checkpoints.wait()
        with pytest.raises(CheckpointError) as error:
            checkpoints.save(2, large)
            checkpoints.wait()
        message = str(error.value)
        assert "Step 2 could not be saved in" in message and str(directory) in message
        assert "the disk is full" in message
        assert "The last complete checkpoint is step 1" in message
        assert entries(directory) == ["1"]
        checkpoints.save(2, {"x": small["x"] + jnp.uint32(1)})
        _, state = checkpoints.restore(abstract(small))
        np.testing.assert_array_equal(state["x"], noise[:100] + np.uint32(1))


@pytest.mark.parametrize("part", ["blocking", "background"])
def test_an_error_of_the_disk_in_either_part_of_a_save(tmp_path, monkeypatch, part):
    def full(*args, **kwargs):
        raise ValueError("while writing") from OSError(errno.ENOSPC, "No space left")

    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(1, small_state(1))
        checkpoints.wait()
        with monkeypatch.context() as patch:
            if part == "blocking":
                patch.setattr(ocp.CheckpointManager, "save", full)
            else:  # the metadata is written by a thread
                patch.setattr(type(checkpoints.directory), "write_text", full)
            with pytest.raises(
                CheckpointError, match="Step 2 .* disk is full.* step 1"
            ):
                checkpoints.save(2, small_state(2))
                checkpoints.wait()
        assert entries(tmp_path) == ["1"]
        checkpoints.save(3, small_state(3))
        assert checkpoints.restore(abstract(small_state(0)))[0] == 3


def test_a_failure_in_the_background_does_not_cost_the_next_save(
    tmp_path, monkeypatch, caplog
):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left")

    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(1, small_state(1))
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(type(checkpoints.directory), "write_text", full)
            checkpoints.save(2, small_state(2))
            time.sleep(0.5)
        checkpoints.save(3, small_state(3))
        assert "Step 2 could not be saved" in caplog.text
    assert entries(tmp_path) == ["1", "3"]


def test_a_place_that_is_not_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "run", config=CONFIG)
    with pytest.raises(CheckpointError, match="Step 1 could not be saved.*no complete"):
        checkpoints.save(1, small_state(1))
