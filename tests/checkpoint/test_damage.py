"""Damaged steps are found, moved aside, and the one before is used."""

import shutil

import pytest
from saved_states import (
    CONFIG,
    abstract,
    assert_same,
    damage,
    entries,
    small_state,
    write,
)

from jaxlab.checkpoint import CheckpointError, Checkpoints

# When one array cannot be read, orbax drops the coroutines that read the others; Python
# says so when they are collected, which must happen before another file's tests.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.mark.parametrize("how", ["removed", "truncated", "empty", "one bit"])
def test_any_damaged_file_gives_right_values_or_the_step_before(tmp_path, how):
    original = tmp_path / "original"
    write(original, [1, 2])
    files = [p for p in (original / "2").rglob("*") if p.is_file()]
    assert len(files) > 8
    fell_back = 0
    for file in files:
        copy = tmp_path / "copy"
        shutil.copytree(original, copy)
        damage(copy / file.relative_to(original), how)
        step, state = Checkpoints(copy, config=CONFIG).restore(abstract(small_state(0)))
        assert_same(state, small_state(step))
        if step == 1:
            fell_back += 1
        shutil.rmtree(copy)
    assert fell_back >= 3  # at least the metadata, the arrays' manifest and values


def test_fallback_says_what_and_frees_the_step(tmp_path, caplog):
    write(tmp_path, [1, 2, 3])
    damage(tmp_path / "3" / "meta" / "metadata", "one bit")
    (tmp_path / "2" / "state").rename(tmp_path / "2" / "other")
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        step, state = checkpoints.restore(abstract(small_state(0)))
        assert step == 1
        assert_same(state, small_state(1))
        assert entries(tmp_path) == ["1", "corrupt-2", "corrupt-3"]
        said = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
        assert "Step 3" in said[0] and "its metadata file is damaged" in said[0]
        assert "moved to corrupt-3, and step 1 is used instead" in said[0]
        assert "Step 2" in said[1] and "its arrays cannot be read" in said[1]
        checkpoints.save(2, small_state(2))
        checkpoints.save(3, small_state(3))
        assert checkpoints.restore(abstract(small_state(0)))[0] == 3


def test_arrays_of_another_step_do_not_have_the_digest(tmp_path, caplog):
    """Files that are whole and readable, but hold other values."""
    write(tmp_path, [1, 2])
    shutil.rmtree(tmp_path / "2" / "state")
    shutil.copytree(tmp_path / "1" / "state", tmp_path / "2" / "state")
    step, _ = Checkpoints(tmp_path, config=CONFIG).restore(abstract(small_state(0)))
    assert step == 1
    assert "does not have the digest it was saved with" in caplog.text


def test_a_second_damage_of_the_same_step_gets_another_name(tmp_path):
    for _ in range(2):
        shutil.rmtree(tmp_path / "1", ignore_errors=True)
        write(tmp_path, [1, 2])
        damage(tmp_path / "2" / "meta" / "metadata", "empty")
        Checkpoints(tmp_path, config=CONFIG).restore(abstract(small_state(0)))
    assert entries(tmp_path) == ["1", "corrupt-2", "corrupt-2-2"]


def test_when_none_is_usable_each_step_and_reason_is_listed(tmp_path):
    write(tmp_path, [1, 2])
    damage(tmp_path / "1" / "meta" / "metadata", "removed")
    damage(tmp_path / "2" / "meta" / "metadata", "truncated")
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path, config=CONFIG).restore(abstract(small_state(0)))
    assert "step 1: its metadata file is missing" in str(error.value)
    assert "step 2: its metadata file is damaged" in str(error.value)
    assert entries(tmp_path) == ["1", "2"]


def test_a_step_asked_for_by_number_is_used_or_refused(tmp_path):
    write(tmp_path, [1, 2, 3])
    checkpoints = Checkpoints(tmp_path, config=CONFIG)
    step, state = checkpoints.restore(abstract(small_state(0)), step=2)
    assert step == 2
    assert_same(state, small_state(2))
    with pytest.raises(CheckpointError, match=r"no complete .* step 9 .*\[1, 2, 3\]"):
        checkpoints.restore(abstract(small_state(0)), step=9)
    damage(tmp_path / "3" / "meta" / "metadata", "empty")
    with pytest.raises(CheckpointError, match="step 3: its metadata file is damaged"):
        checkpoints.restore(abstract(small_state(0)), step=3)
    assert entries(tmp_path) == ["1", "2", "3"]
