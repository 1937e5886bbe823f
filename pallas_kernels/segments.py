"""Segments of a row, which stay apart even where numbers are not finite.

The parallel forms multiply what a token must not see by 0, and 0 times NaN is NaN. So a
token with a number that is not finite (a broken token) is computed as zeros, and what
depends on it becomes NaN afterwards: its output, those of the tokens behind it in its
segment, and the state if the row ends in that segment. No gradient passes there.

What overflows on the way, from numbers that are finite, may still reach a neighbour.
"""

import functools
import operator
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Segments(NamedTuple):
    """The state before the first token belongs to a row's first segment.

    Attributes:
        present: whether a token is not padding.
        sound: whether it is present and its numbers are finite.
        reset: whether it is the first of a later segment.
        lost: whether it stands at or behind a broken token, or state, of its segment.
        broken_state: whether the state before the first token is broken.
        lost_state: whether the state after the last token is lost.
    """

    present: Bool[Array, "B T"]
    sound: Bool[Array, "B T"]
    reset: Bool[Array, "B T"]
    lost: Bool[Array, "B T"]
    broken_state: Bool[Array, " B"]
    lost_state: Bool[Array, " B"]

    @classmethod
    def of(
        cls,
        segment_ids: Int[Array, "B T"],
        tokens: Iterable[Array],
        states: Iterable[Array] = (),
    ) -> "Segments":
        """Find the segments of a row, and what is not finite in them.

        Args:
            segment_ids: a change starts a new segment; an id < 0 is padding, and ids
              are compared across it.
            tokens: floats [B, T, ...].
            states: floats [B, ...].
        """
        present, reset = borders(segment_ids)
        finite = _all_finite(tokens, present)
        broken_state = ~_all_finite(states, jnp.ones_like(present[:, 0]))
        t = jnp.arange(segment_ids.shape[1])[None]
        before = jnp.where(broken_state, -1, -2)[:, None]
        broken = jax.lax.cummax(jnp.where(present & ~finite, t, before), axis=1)
        lost = broken >= jax.lax.cummax(jnp.where(reset, t, -1), axis=1)
        lost_state = lost[:, -1] if lost.shape[1] else broken_state
        return cls(
            present, present & finite, reset, present & lost, broken_state, lost_state
        )

    def inputs(self, x: Array) -> Array:
        """x [B, T, ...] with zeros for padding and broken tokens."""
        return masked(x, self.sound)

    def outputs(self, y: Array) -> Array:
        """y [B, T, ...] with zeros for padding and NaN for what is lost."""
        fill = jnp.where(self.lost, jnp.nan, 0.0).astype(y.dtype)
        return jnp.where(expanded(self.present & ~self.lost, y), y, expanded(fill, y))

    def state_before(self, state: Array) -> Array:
        """The state [B, ...] before the first token, zero where it is broken."""
        return masked(state, ~self.broken_state)

    def state_after(self, state: Array) -> Array:
        """The state [B, ...] after the last token, NaN where it is lost."""
        nan = jnp.asarray(jnp.nan, state.dtype)
        return jnp.where(expanded(self.lost_state, state), nan, state)


def borders(
    segment_ids: Int[Array, "B T"],
) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """Which tokens are not padding, and which of them start a later segment."""
    present = segment_ids >= 0
    t = jnp.arange(segment_ids.shape[1])[None, :]
    latest = jax.lax.cummax(jnp.where(present, t, -1), axis=1)
    before = jnp.pad(latest, [(0, 0), (1, 0)], constant_values=-1)[:, :-1]
    id_before = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    return present, present & (before >= 0) & (segment_ids != id_before)


def masked(x: Array, kept: Bool[Array, "..."]) -> Array:
    """x with zeros where its leading axes are not kept."""
    return jnp.where(expanded(kept, x), x, jnp.zeros((), x.dtype))


def _all_finite(arrays: Iterable[Array], like: Bool[Array, "..."]):
    """Whether all numbers of each entry along the leading axes are finite."""
    flags = (jnp.isfinite(x).all(tuple(range(like.ndim, x.ndim))) for x in arrays)
    return functools.reduce(operator.and_, flags, jnp.ones_like(like))


def expanded(flags: Array, x: Array) -> Array:
    """The flags with as many axes as x."""
    return flags.reshape(flags.shape + (1,) * (x.ndim - flags.ndim))
