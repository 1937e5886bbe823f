"""Documents packed into rows.

``segment_ids`` ``[B, T]`` numbers the document of each token. A change of id starts a
new document: nothing is seen across it. An id below 0 marks padding, which may stand at
either end of a row: it is seen by no token and changes no state.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

PADDING = -1


def real(segment_ids_BT: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Whether each token is real, not padding."""
    return segment_ids_BT >= 0


def without_padding(x_BT: Array, segment_ids_BT: Int[Array, "B T"] | None) -> Array:
    """Return ``x [B, T, ...]`` with zeros in the place of padding, which may be NaN."""
    if segment_ids_BT is None:
        return x_BT
    is_real = real(segment_ids_BT)
    is_real = is_real.reshape(*is_real.shape, *[1] * (x_BT.ndim - 2))
    return jnp.where(is_real, x_BT, jnp.zeros((), x_BT.dtype))


def documents(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Renumber documents so that ids only grow along a row.

    Equal ids are then one document: an id that comes back after another is a new one.
    Padding becomes `PADDING`.
    """
    before = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=PADDING)
    opens = (segment_ids_BT != before) & real(segment_ids_BT)
    number = jnp.cumsum(opens.astype(jnp.int32), axis=1)
    return jnp.where(real(segment_ids_BT), number, PADDING)


def first_real(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, " B"]:
    """Return the index of each row's first real token; T in a row of padding."""
    is_real = real(segment_ids_BT)
    first = jnp.argmax(is_real, axis=1).astype(jnp.int32)
    return jnp.where(jnp.any(is_real, axis=1), first, is_real.shape[1])


def end_real(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, " B"]:
    """Return one past the index of each row's last real token; T if all is padding."""
    length = segment_ids_BT.shape[1]
    last_from_end = jnp.argmax(real(segment_ids_BT)[:, ::-1], axis=1)
    return (length - last_from_end).astype(jnp.int32)


def at(segment_ids_BT: Int[Array, "B T"], index_B: Int[Array, " B"]) -> Array:
    """Return the id at one index of each row, `PADDING` outside the row."""
    ids = jnp.take_along_axis(
        segment_ids_BT, index_B[:, None], axis=1, mode="fill", fill_value=PADDING
    )
    return ids[:, 0]


def positions(
    segment_ids_BT: Int[Array, "B T"], start_B: Int[Array, " B"]
) -> Int[Array, "B T"]:
    """Return each token's position in its document.

    The first document of a row starts at `start_B`, the others at 0.

    Args:
        segment_ids_BT: document numbers, below 0 for padding.
        start_B: tokens of the first document that came before this row.

    Returns:
        int32 ``[B, T]``; positions of padding mean nothing.
    """
    length = segment_ids_BT.shape[1]
    index_BT = jnp.broadcast_to(
        jnp.arange(length, dtype=jnp.int32)[None], segment_ids_BT.shape
    )
    before = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=PADDING)
    opens = segment_ids_BT != before
    document_start = jax.lax.cummax(jnp.where(opens, index_BT, 0), axis=1)
    in_first = segment_ids_BT == at(segment_ids_BT, first_real(segment_ids_BT))[:, None]
    return index_BT - document_start + jnp.where(in_first, start_B[:, None], 0)
