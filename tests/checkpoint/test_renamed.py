"""States whose fields have been renamed restore from older checkpoints."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.checkpoint import Checkpoints


class Before(NamedTuple):
    count: Any
    lacks: Any


class Now(NamedTuple):
    count: Any
    deviations: Any


def saved_and_restored(directory, saved, wanted, **part):
    with Checkpoints(directory, config={}) as checkpoints:
        checkpoints.save(1, saved)
        checkpoints.wait()
        return checkpoints.restore(jax.eval_shape(lambda: wanted), **part)[1]


@pytest.mark.parametrize("part", (None, "optimizer"), ids=("whole", "part"))
def test_a_renamed_field_is_found_under_its_former_name(part, tmp_path):
    factors = {"layer.x/w": (jnp.arange(6.0).reshape(2, 3), jnp.ones(2))}
    saved = {"optimizer": (Before(jnp.int32(3), factors),)}
    now = {"optimizer": (Now(jnp.int32(3), factors),)}
    wanted = now if part is None else now[part]
    how = {} if part is None else {"subtree": part}
    restored = saved_and_restored(tmp_path, saved, wanted, **how)
    assert jax.tree.structure(restored) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, restored, wanted)


def test_a_parameter_may_have_the_former_name(tmp_path):
    state = {"params": {"lacks": jnp.ones(3)}, "optimizer": Now(jnp.int32(3), None)}
    restored = saved_and_restored(tmp_path, state, state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
