"""Short causal depthwise convolution that respects document borders."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.layers import segments


def short_convolution(
    x_BTD: Float[Array, "B T D"],
    filter_WD: Float[Array, "W D"],
    tail: Float[Array, "B W-1 D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """``y_t = sum_j filter[W-1-j] x_{t-j}`` over the tokens of t's own document.

    Args:
        x_BTD: the sequence.
        filter_WD: one filter of W taps a channel, the last tap on the present token.
        tail: the W-1 inputs before this sequence, which belong to its first document;
            None for the start of a sequence.
        segment_ids: document numbers, see `layers.segments`.

    Returns:
        The outputs, and the last W-1 inputs of the last document (zeros where it has
        fewer), the tail of a following call.
    """
    B, T, D = x_BTD.shape
    width = filter_WD.shape[0]
    taps = filter_WD.astype(x_BTD.dtype)
    if tail is None:
        tail = jnp.zeros((B, width - 1, D), x_BTD.dtype)
    tail = tail.astype(x_BTD.dtype)
    if segment_ids is None:
        x_ext = jnp.concatenate([tail, x_BTD], axis=1)
        y = sum(x_ext[:, j : j + T] * taps[None, None, j] for j in range(width))
        return y, x_ext[:, T:]

    # Row t of x stands at t + W-1; the tail goes just before the first real token.
    first = segments.first_real(segment_ids)
    write = jax.vmap(
        lambda row, block, i: jax.lax.dynamic_update_slice_in_dim(row, block, i, axis=0)
    )
    x_ext = write(jnp.pad(x_BTD, ((0, 0), (width - 1, 0), (0, 0))), tail, first)
    first_id = jnp.broadcast_to(
        segments.at(segment_ids, first)[:, None], (B, width - 1)
    )
    pad_ids = jnp.pad(
        segment_ids, ((0, 0), (width - 1, 0)), constant_values=segments.PADDING
    )
    ids_ext = write(pad_ids, first_id, first)

    def tap(j):
        same = ids_ext[:, j : j + T] == segment_ids
        return jnp.where(same[..., None], x_ext[:, j : j + T] * taps[None, None, j], 0)

    y = sum(tap(j) for j in range(width))
    read = jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, width - 1))
    end = segments.end_real(segment_ids)
    last_id = segments.at(segment_ids, end - 1)
    same = read(ids_ext, end) == last_id[:, None]
    return y, jnp.where(same[..., None], read(x_ext, end), 0)


def convolution_step(
    x_BD: Float[Array, "B D"],
    filter_WD: Float[Array, "W D"],
    tail: Float[Array, "B W-1 D"],
) -> tuple[Float[Array, "B D"], Float[Array, "B W-1 D"]]:
    """`short_convolution` of one token."""
    window = jnp.concatenate([tail.astype(x_BD.dtype), x_BD[:, None]], axis=1)
    y = jnp.sum(window * filter_WD.astype(x_BD.dtype)[None], axis=1)
    return y, window[:, 1:]
