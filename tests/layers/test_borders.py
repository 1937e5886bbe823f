"""What stands in padding reaches nothing, not even as NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.layers import segments
from jaxlab.layers.softmax_attention import softmax_attention

IDS = np.array([[-1, 0, 0, 0, -1, 1, 1, 1, 1, -1]])
T = IDS.shape[1]


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("window", (None, 3))
def test_attention_takes_no_value_of_padding(window):
    q, k, v = (drawn(seed, 1, T, 2, 4) for seed in range(3))
    ids = segments.documents(jnp.asarray(IDS))
    positions = segments.positions(ids, jnp.zeros((1,), jnp.int32))

    @jax.jit
    def results(v):
        def outputs(q, k, v):
            return softmax_attention(q, k, v, ids, positions, window=window)[0]

        o, pull_back = jax.vjp(outputs, q, k, v)
        return o, pull_back(o)

    padded = np.where(IDS[..., None, None] < 0, np.nan, v)
    jax.tree.map(np.testing.assert_array_equal, results(padded), results(v))
