"""Products and placement of the square factors for the sides of a weight."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.params import constrain


def product(
    a: Float[Array, "*stack n k"], b: Float[Array, "*stack k m"]
) -> Float[Array, "*stack n m"]:
    """Return ``a b`` in the full precision of float32, on every kind of device."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def whole(x: Array) -> Array:
    """Replicate `x` on every device, so that no step leaves it sharded."""
    return constrain(x, *(None,) * x.ndim)
