"""Rates of decay are finite, whatever was learned."""

import jax
import numpy as np

from jaxlab.layers.decay import decay_rate


def test_a_rate_is_finite_and_so_is_its_gradient():
    logs = np.array([-200.0, 0.0, 87.0, 89.0, 1e30, np.inf], np.float32)
    rates, slopes = jax.vmap(jax.value_and_grad(decay_rate))(logs)
    np.testing.assert_allclose(rates[:3], np.exp(logs[:3]), rtol=1e-6)
    np.testing.assert_array_equal(slopes[:3], rates[:3])
    assert np.isfinite(rates).all() and not slopes[3:].any()
    assert not np.any(rates * 0.0)
