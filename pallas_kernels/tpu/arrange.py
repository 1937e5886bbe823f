"""Arranging tokens for the TPU kernels over chunks, and back."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import layout
from pallas_kernels.products import input_product
from pallas_kernels.tpu.tiles import LANES


def operand_type(
    inputs: tuple[Array, ...], states: Array, precision: jax.lax.Precision | None
) -> tuple[jnp.dtype, bool]:
    """The operand type of the products, and whether they are exact."""
    product = input_product(inputs, states.dtype, precision)
    # The kernels take one pass or all of them; a precision in between takes all.
    return product.operand, product.precision not in (None, jax.lax.Precision.DEFAULT)


def by_head(x: Array, where: layout.Layout) -> Float[Array, "B M rows HD"]:
    """Arrange [B, T, H, D] or [B, T, N, H, D] in chunks of C or N C rows."""
    x = layout.rows(x, where)
    return x.reshape(*x.shape[:2], -1, x.shape[-2] * x.shape[-1])


def from_head(
    x: Array, where: layout.Layout, like: Array | jax.ShapeDtypeStruct
) -> Array:
    """The inverse of `by_head`, with the shape and dtype of `like`."""
    x = x.reshape(like.shape[0], -1, *like.shape[2:])
    return layout.from_rows(x, where, like.shape[1]).astype(like.dtype)


def by_lane(
    x: Float[Array, "B T N H"], where: layout.Layout
) -> Float[Array, "B M H LANES"]:
    """Arrange one number per key along the lanes; zeros after a chunk's last key."""
    x = layout.rows(x.astype(jnp.float32), where)
    x = jnp.moveaxis(x.reshape(*x.shape[:2], -1, x.shape[-1]), 2, 3)
    return jnp.pad(x, [(0, 0)] * 3 + [(0, LANES - x.shape[-1])])


def from_lane(
    x: Float[Array, "B M H LANES"], where: layout.Layout, T: int, N: int = 1
) -> Float[Array, "B T N H"]:
    """The inverse of `by_lane`."""
    B, H = x.shape[0], x.shape[2]
    x = jnp.moveaxis(x[..., : N * where.chunk_size], 3, 2)
    return layout.from_rows(x.reshape(B, -1, N, H), where, T)


def transposed_states(states: Float[Array, "S B H rows columns"]) -> Array:
    """[S B, H, columns, rows], as the kernels carry the states."""
    transposed = jnp.swapaxes(states, -1, -2)
    return transposed.reshape(-1, *transposed.shape[2:])


def from_transposed(states: Float[Array, "SB H columns rows"], like: Array) -> Array:
    """The inverse of `transposed_states`, with the shape of `like`."""
    return jnp.swapaxes(states, -1, -2).reshape(like.shape)


def unless_empty(
    computed: Float[Array, "S B H *size"],
    given: Float[Array, "S B H *size"],
    cu_seqlens: Int[Array, "S+1"] | None,
) -> Array:
    """The `computed` states; the `given` ones for empty sequences.

    No chunk writes the states of an empty sequence.
    """
    if cu_seqlens is None:
        return computed
    empty = cu_seqlens[1:] == cu_seqlens[:-1]
    return jnp.where(empty[:, None, None, None, None], given, computed)


def sums_from(x: Float[Array, "*batch keys"]) -> Array:
    """Sums of x from each key to the last."""
    return jnp.flip(jnp.cumsum(jnp.flip(x, -1), -1), -1)


def sums_before(x: Float[Array, "*batch keys"]) -> Array:
    """Sums of x before each key."""
    x = jnp.pad(x[..., :-1], [(0, 0)] * (x.ndim - 1) + [(1, 0)])
    return jnp.cumsum(x, -1)
