"""Tokens routed to memories: one stream of rows, sorted by memory.

Every token takes k of M memories, so that there are ``N = B T k`` rows whatever the
routing: shapes are static and no token is dropped. The rows of a memory are contiguous,
and so are those of a batch row within them, in order of time: each pair of a memory and
a batch row is a sequence. Padding tokens come last and belong to no sequence.

Dimension key: B batch, T time, k choices a token, M memories, N rows of the stream,
S = M B sequences, W taps of a convolution.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.layers import segments
from jaxlab.layers.convolution import short_convolution


class Stream(NamedTuple):
    """Which choice is in which row, and where sequences and documents change.

    Attributes:
        choice: the choice in each row, an index into the flattened ``[B, T, k]``.
        row: the row of each choice, the inverse of `choice`.
        sizes: the number of rows of each memory.
        cu_seqlens: where each sequence starts, and where the last one ends.
        sequence: memory * B + batch row, for each row; S for padding.
        document: the document of each row.
        first, last: the first and the last document of each sequence's batch row. A
            given state belongs to the first, the returned state to the last.
    """

    choice: Int[Array, " N"]
    row: Int[Array, "B T k"]
    sizes: Int[Array, " M"]
    cu_seqlens: Int[Array, "S+1"]
    sequence: Int[Array, " N"]
    document: Int[Array, " N"]
    first: Int[Array, " S"]
    last: Int[Array, " S"]

    @property
    def starts(self) -> Bool[Array, " N"]:
        """Whether a row is the first of its sequence."""
        return self.sequence != jnp.roll(self.sequence, 1).at[0].set(-1)

    @property
    def resets(self) -> Bool[Array, " N"]:
        """Whether a row's document differs from that of the row or state before."""
        state = self.first.at[self.sequence].get(mode="clip")
        before = jnp.where(self.starts, state, jnp.roll(self.document, 1))
        return self.document != before

    @property
    def carries(self) -> Bool[Array, " S"]:
        """Whether the state at the end of a sequence belongs to the last document."""
        starts, ends = self.cu_seqlens[:-1], self.cu_seqlens[1:]
        latest = self.document.at[ends - 1].get(mode="clip")
        return jnp.where(starts == ends, self.first, latest) == self.last


def sort_by_memory(
    memory_BTk: Int[Array, "B T k"],
    n_memories: int,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Stream:
    """Sort the tokens' choices into a stream.

    Args:
        memory_BTk: the memories that each token takes, all different.
        n_memories: M.
        segment_ids: document numbers, see `layers.segments`.
    """
    B, T, k = memory_BTk.shape
    S = n_memories * B
    if segment_ids is None:
        segment_ids = jnp.zeros((B, T), jnp.int32)
    document = segments.documents(segment_ids)
    first = segments.at(document, segments.first_real(document))
    last = segments.at(document, segments.end_real(document) - 1)

    sequence = memory_BTk * B + jnp.arange(B, dtype=jnp.int32)[:, None, None]
    sequence = jnp.where(segments.real(document)[..., None], sequence, S).reshape(-1)
    choice = jnp.argsort(sequence, stable=True).astype(jnp.int32)
    index = jnp.arange(B * T * k, dtype=jnp.int32)
    row = jnp.zeros_like(index).at[choice].set(index, unique_indices=True)
    sequence = sequence[choice]
    bounds = jnp.arange(S + 1, dtype=jnp.int32)
    cu_seqlens = jnp.searchsorted(sequence, bounds).astype(jnp.int32)
    return Stream(
        choice=choice,
        row=row.reshape(B, T, k),
        sizes=cu_seqlens[B::B] - cu_seqlens[:-1:B],
        cu_seqlens=cu_seqlens,
        sequence=sequence,
        document=document.reshape(-1)[choice // k],
        first=jnp.tile(first, n_memories),
        last=jnp.tile(last, n_memories),
    )


# The transpose of a permutation is its inverse. With gradients written that way, the
# backward passes gather where XLA would scatter.


@jax.custom_vjp
def to_rows(x_BT: Float[Array, "B T *d"], stream: Stream) -> Float[Array, "N *d"]:
    """Gather the token of each row."""
    k = stream.row.shape[2]
    return _take(x_BT.reshape(-1, *x_BT.shape[2:]), stream.choice // k)


@jax.custom_vjp
def to_choices(x_N: Float[Array, "N *d"], stream: Stream) -> Float[Array, "B T k *d"]:
    """Gather the row of each choice."""
    return _take(x_N, stream.row)


def _take(x, index):
    return x.at[index].get(mode="promise_in_bounds")


def _to_rows_backward(stream, d_rows):
    return jnp.sum(_take(d_rows, stream.row), axis=2), None


def _to_choices_backward(stream, d_choices):
    return _take(d_choices.reshape(-1, *d_choices.shape[3:]), stream.choice), None


to_rows.defvjp(lambda x, s: (to_rows(x, s), s), _to_rows_backward)
to_choices.defvjp(lambda x, s: (to_choices(x, s), s), _to_choices_backward)


def stream_convolution(
    x_ND: Float[Array, "N D"],
    filter_WD: Float[Array, "W D"],
    stream: Stream,
    tails: Float[Array, "S W-1 D"] | None = None,
) -> tuple[Float[Array, "N D"], Float[Array, "S W-1 D"] | None]:
    """Run `short_convolution` along each sequence, without crossing documents.

    Args:
        x_ND: the rows.
        filter_WD: the filters, the same for all memories.
        stream: the order of the rows.
        tails: the W-1 inputs before each sequence, or None.

    Returns:
        The outputs, and the tails for a following call (None if none were given).
    """
    number = jnp.cumsum((stream.starts | stream.resets).astype(jnp.int32))
    y, _ = short_convolution(x_ND[None], filter_WD, segment_ids=number[None])
    if tails is None or tails.shape[1] == 0:  # none given, or a filter of one tap
        return y[0], tails
    given, tails = tails.dtype, tails.astype(x_ND.dtype)
    past = tails.shape[1]
    starts, ends = stream.cu_seqlens[:-1, None], stream.cu_seqlens[1:, None]
    first, last = stream.first[:, None], stream.last[:, None]
    i = jnp.arange(past, dtype=jnp.int32)[None]

    # What a tail adds to the rows that follow it in its document.
    echo, _ = short_convolution(
        jnp.concatenate([tails, jnp.zeros_like(tails)], axis=1), filter_WD
    )
    document = stream.document.at[starts + i].get(mode="clip")
    follows = (starts + i < ends) & (document == first)
    row = jnp.where(follows, starts + i, x_ND.shape[0])
    y = y[0].at[row].add(echo[:, past:], mode="drop")

    # The last inputs of the last document, from the tail where the sequence is shorter.
    row = ends - past + i
    is_row = row >= starts
    document = jnp.where(is_row, stream.document.at[row].get(mode="clip"), first)
    older = jnp.take_along_axis(
        tails, jnp.where(is_row, 0, ends - starts + i)[..., None], axis=1
    )
    newest = jnp.where(is_row[..., None], x_ND.at[row].get(mode="clip"), older)
    newest = jnp.where((document == last)[..., None], newest, 0)
    return y, newest.astype(given)
