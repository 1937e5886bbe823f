"""Initialisers of parameters that are not matrices."""

import math

import jax
import jax.numpy as jnp

from jaxlab.params.spec import Initializer


def uniform(low: float, high: float) -> Initializer:
    """Return an initialiser that is uniform between `low` and `high`."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, low, high)


def log_of_uniform(low: float, high: float) -> Initializer:
    """Return an initialiser for the logarithms of decay rates: log(uniform)."""
    return lambda *args: jnp.log(uniform(low, high)(*args))


def inverse_softplus_of_time_step(key, shape, dtype):
    """Draw values whose softplus, a time step, is log-uniform in [1e-3, 1e-1].

    Reference: Dao and Gu, Mamba-2, arXiv 2405.21060.
    """
    dt = jnp.exp(uniform(math.log(1e-3), math.log(1e-1))(key, shape, dtype))
    return dt + jnp.log(-jnp.expm1(-dt))
