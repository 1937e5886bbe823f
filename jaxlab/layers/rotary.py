"""Rotary position embedding."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary(
    x_BTHD: Float[Array, "B T H D"], positions_BT: Int[Array, "B T"], base: float
) -> Float[Array, "B T H D"]:
    """Rotate channel pairs ``(i, i + D/2)`` by ``position * base^(-2i/D)`` radians.

    The product of two rotated vectors depends only on the difference of their
    positions. Angles are float32.

    Reference: Su et al., "RoFormer", arXiv 2104.09864, eq. 34 (half-split pairs).
    """
    half = x_BTHD.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BTD = positions_BT.astype(jnp.float32)[..., None] * frequency[None, None]
    cos, sin = jnp.cos(angle_BTD)[:, :, None], jnp.sin(angle_BTD)[:, :, None]
    x1, x2 = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return rotated.astype(x_BTHD.dtype)
