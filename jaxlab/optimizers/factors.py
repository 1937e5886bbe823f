"""Products and placement of the square factors of a weight's sides."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.params import constrain


def product(
    a: Float[Array, "*stack n k"], b: Float[Array, "*stack k m"]
) -> Float[Array, "*stack n m"]:
    """``a b`` in the full precision of float32, on every kind of device."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def whole(x: Array) -> Array:
    """`x` on every device, so that no step leaves it split another way."""
    return constrain(x, *(None,) * x.ndim)
