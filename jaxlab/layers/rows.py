"""Slices along time that start at another place in each row of a batch."""

import jax
from jaxtyping import Array, Int


def read(x_BT: Array, start_B: Int[Array, " B"], size: int) -> Array:
    """Return ``x[b, start_b : start_b + size]``, clamped to lie within the row."""
    return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, size))(
        x_BT, start_B
    )


def write(x_BT: Array, block_BS: Array, start_B: Int[Array, " B"]) -> Array:
    """Return `x` with ``x[b, start_b : start_b + S] = block_b``."""
    return jax.vmap(
        lambda row, block, i: jax.lax.dynamic_update_slice_in_dim(row, block, i, axis=0)
    )(x_BT, block_BS, start_B)
