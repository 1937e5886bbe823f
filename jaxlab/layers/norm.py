"""Normalisation of vectors, computed in float32 whatever the input's dtype."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*rows d"], scale: Float[Array, " d"], eps: float = 1e-6
) -> Float[Array, "*rows d"]:
    """Return ``scale * x / sqrt(mean(x^2) + eps)``.

    Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    x_f32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + eps)
    row = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x_f32 * inverse * row).astype(x.dtype)


def l2_normalize(
    x: Float[Array, "*rows d"], eps: float = 1e-6
) -> Float[Array, "*rows d"]:
    """Return ``x / sqrt(sum(x^2) + eps)``: of unit length; zero stays zero."""
    x_f32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.sum(x_f32 * x_f32, axis=-1, keepdims=True) + eps)
    return (x_f32 * inverse).astype(x.dtype)
