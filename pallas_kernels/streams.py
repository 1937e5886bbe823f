"""Streams of tokens: segments of a row, and sequences behind one another in one row.

Padding becomes operands of zero, which leave every state as it is; a reset becomes a
decay by exactly zero, g = -inf.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def segments(
    segment_ids: Int[Array, "B T"],
) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """Which tokens are no padding, and which of these start a segment but the first."""
    present = segment_ids >= 0
    t = jnp.arange(segment_ids.shape[1])[None, :]
    latest = jax.lax.cummax(jnp.where(present, t, -1), axis=1)
    before = jnp.pad(latest, [(0, 0), (1, 0)], constant_values=-1)[:, :-1]
    id_before = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    return present, present & (before >= 0) & (segment_ids != id_before)


def vary_like(x: Array, arrays: list[Array]) -> Array:
    """Inside `jax.shard_map`, let x vary over the mesh axes the arrays vary over.

    A loop's state must vary as its results do, also where it starts from zeros.
    """

    def varying(array):
        kind = jax.typeof(array)
        # Named `vma` until JAX 0.12.
        return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying

    axes = frozenset().union(*map(varying, arrays)) - varying(x)
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def masked(x: Array, present: Bool[Array, "B T"]) -> Array:
    """x [B, T, ...], zero where the token is padding."""
    present = present.reshape(present.shape + (1,) * (x.ndim - 2))
    return jnp.where(present, x, jnp.zeros((), x.dtype))


def inside(cu_seqlens: Int[Array, "S+1"], T: int) -> Bool[Array, "1 T"]:
    """Which of T tokens belong to a sequence."""
    t = jnp.arange(T, dtype=cu_seqlens.dtype)
    return ((t >= cu_seqlens[0]) & (t < cu_seqlens[-1]))[None]


def owner(cu_seqlens: Int[Array, "S+1"], T: int) -> Int[Array, " T"]:
    """The sequence of each of T tokens; the last one's for tokens of none."""
    t = jnp.arange(T, dtype=cu_seqlens.dtype)
    sequence = jnp.searchsorted(cu_seqlens[1:], t, side="right")
    return jnp.minimum(sequence, cu_seqlens.shape[0] - 2)
