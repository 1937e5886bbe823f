"""Short causal depthwise convolution that respects document borders."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.layers import rows, segments


def short_convolution(
    x_BTD: Float[Array, "B T D"],
    filter_WD: Float[Array, "W D"],
    tail: Float[Array, "B W-1 D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """Compute ``y_t = sum_j filter[W-1-j] x_{t-j}`` over the tokens of t's document.

    Args:
        x_BTD: the sequence.
        filter_WD: W taps for each channel; the last multiplies the present token.
        tail: the W-1 inputs before this sequence, which belong to its first document;
            None for the start of a sequence.
        segment_ids: document numbers, see `layers.segments`.

    Returns:
        The outputs, and the tail for a following call: the last W-1 inputs of the last
        document, with zeros where it has fewer.
    """
    B, T, D = x_BTD.shape
    width = filter_WD.shape[0]
    taps = filter_WD.astype(x_BTD.dtype)
    if segment_ids is None:
        segment_ids = jnp.zeros((B, T), jnp.int32)
    x_BTD = segments.without_padding(x_BTD, segment_ids)
    segment_ids = segments.documents(segment_ids)
    # Row t of x is row t + W-1 of x_ext.
    before = ((0, 0), (width - 1, 0))
    x_ext = jnp.pad(x_BTD, (*before, (0, 0)))
    ids_ext = jnp.pad(segment_ids, before, constant_values=segments.PADDING)
    if tail is not None:  # it goes just before the first real token
        first = segments.first_real(segment_ids)
        first_id = segments.at(segment_ids, first)[:, None]
        x_ext = rows.write(x_ext, tail.astype(x_BTD.dtype), first)
        ids_ext = rows.write(ids_ext, jnp.tile(first_id, (1, width - 1)), first)

    def tap(j):
        same = (ids_ext[:, j : j + T] == segment_ids).astype(x_BTD.dtype)
        return same[..., None] * x_ext[:, j : j + T] * taps[None, None, j]

    y = functools.reduce(jnp.add, map(tap, range(width)))
    end = segments.end_real(segment_ids)
    last_id = segments.at(segment_ids, end - 1)
    same = rows.read(ids_ext, end, width - 1) == last_id[:, None]
    newest = jnp.where(same[..., None], rows.read(x_ext, end, width - 1), 0)
    return y, newest if tail is None else newest.astype(tail.dtype)


def convolution_step(
    x_BD: Float[Array, "B D"],
    filter_WD: Float[Array, "W D"],
    tail: Float[Array, "B W-1 D"],
) -> tuple[Float[Array, "B D"], Float[Array, "B W-1 D"]]:
    """Run `short_convolution` for one token."""
    window = jnp.concatenate([tail.astype(x_BD.dtype), x_BD[:, None]], axis=1)
    y = jnp.sum(window * filter_WD.astype(x_BD.dtype)[None], axis=1)
    return y, window[:, 1:].astype(tail.dtype)
