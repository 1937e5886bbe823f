"""Saving and restoring: exact, onto any mesh, in order."""

import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from saved_states import (
    CONFIG,
    abstract,
    assert_same,
    entries,
    mesh,
    put,
    small_state,
    write,
)

from jaxlab.checkpoint import CheckpointError, Checkpoints


def test_round_trip_onto_another_mesh(tmp_path):
    m = mesh(4, 2)
    bits = np.random.default_rng(1).integers(0, 2**16, (8, 4), np.uint16)
    state = (
        {
            "w": put(jnp.arange(64.0 * 32).reshape(64, 32), m, "data", "tensor"),
            "any bits": put(bits.view(ml_dtypes.bfloat16), m, "data"),
            "float8": put(jnp.ones((8,), jnp.float8_e4m3fn), m),
            "complex": put(jnp.full((4,), 1 - 2j, jnp.complex64), m),
        },
        [put(jnp.arange(-8, 8, dtype=jnp.int8), m, "data"), put(np.array([True]), m)],
        put(jax.random.split(jax.random.key(3), 8), m, "data"),
        put(jax.random.key(3, impl="rbg"), m),
        put(jnp.zeros((0, 4)), m),
        None,
    )
    other = mesh(2, 4)
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(7, state)
        step, restored = checkpoints.restore(abstract(state, other))
    assert step == 7
    assert_same(restored, state)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert x.sharding.is_equivalent_to(
            NamedSharding(other, y.sharding.spec), x.ndim
        )
    # The keys are keys of the same generator.
    assert jax.random.key_impl(restored[3]) == "rbg"


def test_state_may_be_donated_right_after_save(tmp_path):
    update = jax.jit(lambda x: x * 2.0 + 1.0, donate_argnums=0)
    x = put(np.random.default_rng(0).normal(size=(512, 512)), mesh(4, 2), "data")
    with Checkpoints(tmp_path, config=CONFIG, keep=9) as checkpoints:
        expected = {}
        for step in range(4):
            expected[step] = np.asarray(x).copy()
            checkpoints.save(step, {"x": x})
            for _ in range(3):
                x = update(x)
        for step, value in expected.items():
            _, state = checkpoints.restore(abstract({"x": x}), step=step)
            np.testing.assert_array_equal(state["x"], value)


def test_a_running_save_is_waited_for(tmp_path):
    x = put(np.zeros((1024, 1024), np.float32), mesh(4, 2), "data")
    with Checkpoints(tmp_path, config=CONFIG, keep=9) as checkpoints:
        for step in range(5):
            checkpoints.save(step, {"x": x})
    assert entries(tmp_path) == ["0", "1", "2", "3", "4"]


def test_keeps_the_newest_and_the_best_across_a_restart(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: None, 6: 4.0}
    for some in [(1, 2, 3), (4, 5, 6)]:
        with Checkpoints(tmp_path, config=CONFIG, keep=2, keep_best=1) as checkpoints:
            for step in some:
                loss = losses[step]
                metrics = None if loss is None else {"loss": loss}
                checkpoints.save(step, {"x": jnp.ones(3)}, metrics=metrics)
    assert entries(tmp_path) == ["2", "5", "6"]


def test_part_of_a_state(tmp_path):
    write(tmp_path, [5])
    state = small_state(5)
    _, params = Checkpoints(tmp_path, config=CONFIG).restore(
        abstract(state["params"]), subtree="params"
    )
    assert_same(params, state["params"])
    _, key = Checkpoints(tmp_path, config=CONFIG).restore(
        abstract(state["key"]), subtree="key"
    )
    assert_same(key, state["key"])


def test_reading_an_empty_place_makes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "misspelt", config=CONFIG)
    assert checkpoints.latest_step() is None
    with pytest.raises(CheckpointError, match="no checkpoint in .*misspelt"):
        checkpoints.restore({})
    with pytest.raises(CheckpointError, match="no checkpoint in .*misspelt"):
        checkpoints.load_config()
    checkpoints.close()
    assert entries(tmp_path) == []


def test_steps_only_increase(tmp_path):
    write(tmp_path, [3])
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        for step in (2, 3):
            with pytest.raises(CheckpointError, match="already holds step 3"):
                checkpoints.save(step, small_state(9))
        _, state = checkpoints.restore(abstract(small_state(3)))
        assert_same(state, small_state(3))
        # A last save that falls on a regular one.
        for _ in range(2):
            checkpoints.save(4, small_state(4))
    assert entries(tmp_path) == ["3", "4"]


def test_an_unfinished_save_is_ignored_and_then_removed(tmp_path):
    write(tmp_path, [3])
    unfinished = tmp_path / "7.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "3", unfinished)
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        assert checkpoints.latest_step() == 3
        assert checkpoints.restore(abstract(small_state(3)))[0] == 3
        assert unfinished.exists()  # it may be a running save of another program
        checkpoints.save(4, small_state(4))
    assert entries(tmp_path) == ["3", "4"]


def test_config_comes_back(tmp_path):
    write(tmp_path, [1])
    assert Checkpoints(tmp_path, config={}).load_config() == CONFIG
    with pytest.raises(CheckpointError, match="step 9: .*missing"):
        Checkpoints(tmp_path, config={}).load_config(9)
