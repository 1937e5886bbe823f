"""States as values: rows taken, put in and repeated, for every mixer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import models
from jaxlab.mixers import MIXERS
from jaxlab.models import LMConfig, insert_rows, repeat_rows, take_rows

WIDTH, T = 8, 5
SIZES = {"mamba2": {"head_size": 4}, "lact": {"n_fast_heads": 2}}


@pytest.mark.parametrize("name", MIXERS)
def test_rows_of_a_state_are_the_rows_of_its_batch(name):
    sizes = SIZES.get(name, {}) | ({} if "mamba" in name else {"n_heads": 2})
    cfg = LMConfig(16, WIDTH, 2, (MIXERS[name].Config(WIDTH, **sizes),))
    rng = np.random.default_rng(2)
    p = jax.tree.map(
        lambda spec: jnp.asarray(0.3 * rng.standard_normal(spec.shape), spec.dtype),
        models.spec(cfg),
    )
    tokens = rng.integers(0, 16, (2, T), np.int32)

    @jax.jit
    def run(tokens):
        state = models.init_state(cfg, 2, T)
        return models.hidden(p, tokens, cfg, state=state)[1]

    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)

    def close(a, b):  # some mixers sort the rows of a batch together
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), a, b)

    rows = np.array([1])

    @jax.jit
    def of_rows(state, other):
        mixed = insert_rows(state, rows, take_rows(other, rows))
        return {
            "turned": take_rows(state, np.array([1, 0])),
            "twice": repeat_rows(take_rows(state, rows), 2),
            "repeated": take_rows(repeat_rows(state, 3), np.array([2, 3])),
            "put back": insert_rows(state, rows, take_rows(state, rows)),
            "mixed": [take_rows(mixed, rows), take_rows(mixed, 1 - rows)],
            "apart": [take_rows(other, rows), take_rows(state, 1 - rows)],
        }

    state, other = run(tokens), run(tokens[:, ::-1])
    found = of_rows(state, other)
    close(run(tokens[::-1]), found["turned"])
    close(run(tokens[np.array([1, 1])]), found["twice"])
    same(found["repeated"], state)
    same(found["put back"], state)
    same(found["mixed"], found["apart"])
