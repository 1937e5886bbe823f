"""Tokens to chunks and back: [B, T, ...] to [M, B, H, rows, ...] for M chunks.

The chunk axis is first, to be scanned over; batch and heads stay separate axes, to be
sharded. Rows without a token are zero, and so do not change a state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.platform import platform
from pallas_kernels.streams import owner


class Layout(NamedTuple):
    """The places of tokens in chunks.

    Attributes:
        chunk_size: C, tokens per chunk.
        group: the number of chunks is a multiple of this.
        source: the token of each row of all chunks, T or more where there is none; None
          if row t is token t.
        target: the row of each token; None if row t is token t.
        sequence: the sequence of each chunk; None for a single sequence.
    """

    chunk_size: int
    group: int = 1
    source: Int[Array, "MC"] | None = None
    target: Int[Array, "T"] | None = None
    sequence: Int[Array, "M"] | None = None


# The number of keys, over batch rows and heads, whose temporaries fit in a CPU's cache.
KEYS_IN_CACHE = 1024


def arrange(
    T: int, C: int, keys: int | None, cu_seqlens: Int[Array, "S+1"] | None
) -> Layout:
    """The layout of T tokens in chunks of C.

    Args:
        keys: number of keys in one chunk, over batch rows and heads, for chunks that
          are computed in groups; None for chunks computed one after another.
        cu_seqlens: the start of each sequence and the end of the last one; every
          sequence then starts a new chunk.
    """
    M = -(-T // C)
    if cu_seqlens is not None:
        M += cu_seqlens.shape[0] - 1  # each wastes less than one chunk
    group = 1 if keys is None else chunks_together(M, keys)
    if cu_seqlens is None:
        return Layout(C, group)
    return _ragged(cu_seqlens, T, C, M, group)


def chunks_together(chunks: int, keys: int) -> int:
    """The number of chunks to compute in one batched product.

    A CPU is fastest while its operands stay in the cache; other devices are fastest
    with all chunks at once.

    Args:
        chunks: M, the number of all chunks.
        keys: number of keys in one chunk, as in `arrange`.
    """
    if platform() != "cpu":
        return chunks
    groups = -(-chunks // max(1, KEYS_IN_CACHE // keys))
    return -(-chunks // groups)


def in_groups(some_chunks, states: Array, chunks, layout: Layout):
    """Run all chunks, `layout.group` at a time.

    Args:
        some_chunks: (chunks, states, sequence) -> (o, states), for any number of chunks
          in the leading axes of `chunks`, `sequence` and `o`.

    Returns:
        (o, states) of all chunks.
    """

    def run(states, group):
        o, states = some_chunks(group[0], states, group[1])
        return states, o

    groups = jax.tree.map(
        lambda x: x.reshape(-1, layout.group, *x.shape[1:]), (chunks, layout.sequence)
    )
    states, o = jax.lax.scan(run, states, groups)
    return o.reshape(-1, *o.shape[2:]), states


def _ragged(cu_seqlens: Int[Array, "S+1"], T: int, C: int, M: int, group: int):
    S = cu_seqlens.shape[0] - 1
    M += -M % group
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    bounds = chunk_bounds(cu_seqlens, C)
    chunk_starts, chunk_ends = bounds[:-1], bounds[1:]

    m = jnp.arange(M, dtype=cu_seqlens.dtype)
    sequence = jnp.searchsorted(chunk_ends, m, side="right")
    sequence = jnp.minimum(sequence, S - 1)
    first = starts[sequence] + (m - chunk_starts[sequence]) * C
    token = first[:, None] + jnp.arange(C, dtype=cu_seqlens.dtype)[None, :]
    source = jnp.where(token < ends[sequence][:, None], token, T)

    t = jnp.arange(T, dtype=cu_seqlens.dtype)
    sequence_of_token = owner(cu_seqlens, T)
    target = chunk_starts[sequence_of_token] * C + t - starts[sequence_of_token]
    return Layout(C, group, source.reshape(-1), target, sequence)


def chunk_bounds(cu_seqlens: Int[Array, "S+1"], C: int) -> Int[Array, "S+1"]:
    """The first chunk of each sequence, and the number of all chunks."""
    chunks = (jnp.diff(cu_seqlens) + C - 1) // C
    return jnp.pad(jnp.cumsum(chunks, dtype=cu_seqlens.dtype), (1, 0))


def by_token(x: Float[Array, "B T H *d"], layout: Layout) -> Array:
    """[B, T, H, ...] to [M, B, H, C, ...]."""
    return jnp.moveaxis(rows(x, layout), (1, 3), (0, 2))


def by_key(x: Float[Array, "B T N H *d"], layout: Layout) -> Array:
    """[B, T, N, H, ...] to [M, B, H, C N, ...]."""
    x = jnp.moveaxis(rows(x, layout), (1, 4), (0, 2))
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def to_tokens(o: Float[Array, "M B H C V"], layout: Layout, T: int) -> Array:
    """[M, B, H, C, V] to [B, T, H, V]; undefined for tokens outside all sequences."""
    o = jnp.moveaxis(o, (0, 2), (1, 3))
    return from_rows(o.reshape(o.shape[0], -1, *o.shape[3:]), layout, T)


def from_rows(o: Float[Array, "B MC H V"], layout: Layout, T: int) -> Array:
    """Rows of all chunks to [B, T, H, V]; undefined for tokens outside sequences."""
    if layout.target is None:
        return o[:, :T]
    return jnp.take(o, layout.target, axis=1, mode="clip")


def rows(x: Float[Array, "B T *d"], layout: Layout) -> Array:
    """[B, T, ...] to [B, M, C, ...]."""
    C = layout.chunk_size
    if layout.source is None:
        pad = [(0, 0)] * x.ndim
        pad[1] = (0, -x.shape[1] % (C * layout.group))
        x = jnp.pad(x, pad)
    else:
        x = jnp.take(x, layout.source, axis=1, mode="fill", fill_value=0)
    return x.reshape(x.shape[0], -1, C, *x.shape[2:])


def round_up_to_power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size` (>= 1)."""
    return 1 << (size - 1).bit_length()
