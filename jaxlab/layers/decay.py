"""Rates of decay from the logarithms that are learned."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.params import value

LARGEST = 88.0  # its exponential is finite in float32


def decay_rate(a_log: Any) -> Float[Array, "*shape"]:
    """Return ``exp(a_log)`` in float32, at most ``exp(88)``.

    The exponential of more is infinite, and infinity times a time step of 0 is NaN.
    """
    return jnp.exp(jnp.minimum(value(a_log).astype(jnp.float32), LARGEST))
