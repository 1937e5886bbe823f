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
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int


class Segments(NamedTuple):
    """Which tokens are padding, begin a segment, or are lost to what is not finite.

    The flags have the axes ``"BT"`` (rows, time), or ``"BTH"`` where heads are
    independent. The state before the first token belongs to a row's first segment.

    Attributes:
        axes: of the flags of tokens, a letter each.
        present: whether a token is not padding, [B, T].
        reset: whether it is the first of a later segment, [B, T].
        sound: whether it is present and its numbers are finite.
        lost: whether it stands at or behind a broken token, or state, of its segment.
        broken_state: whether the state before the first token is broken.
        lost_state: whether the state after the last token is lost.
    """

    axes: str
    present: Bool[Array, "B T"]
    reset: Bool[Array, "B T"]
    sound: Bool[Array, "B T *H"]
    lost: Bool[Array, "B T *H"]
    broken_state: Bool[Array, "B *H"]
    lost_state: Bool[Array, "B *H"]

    @classmethod
    def of(
        cls,
        segment_ids: Int[Array, "B T"],
        tokens: Iterable[tuple[str, Array]],
        states: Iterable[tuple[str, Array]] = (),
        axes: str = "BT",
    ) -> "Segments":
        """Find the segments of a row, and what is not finite in them.

        Args:
            segment_ids: a change starts a new segment; an id < 0 is padding, and ids
              are compared across it.
            tokens: floats, each with its axes, such as "BTNHK".
            states: floats, each with its axes, such as "BHKV".
            axes: of the flags.
        """
        present, reset = borders(segment_ids)
        finite = _all_finite(tokens, axes)
        sound = _expanded(present, "BT", axes) & finite
        broken = _expanded(present, "BT", axes) & ~finite
        row = axes.replace("T", "")
        rows = broken.shape[:1] + broken.shape[2:]
        broken_state = jnp.zeros(rows, bool) | ~_all_finite(states, row)
        # What happened last: even numbers are resets, odd ones something broken.
        t = 2 * _expanded(jnp.arange(1, segment_ids.shape[1] + 1), "T", axes)
        event = jnp.where(broken, t + 1, jnp.where(_expanded(reset, "BT", axes), t, 0))
        event = jnp.maximum(event, broken_state[:, None].astype(event.dtype))
        lost = jax.lax.cummax(event, axis=1) % 2 == 1
        lost_state = lost[:, -1] if lost.shape[1] else broken_state
        lost &= _expanded(present, "BT", axes)
        return cls(axes, present, reset, sound, lost, broken_state, lost_state)

    def inputs(self, x: Array, axes: str) -> Array:
        """x with zeros for padding and broken tokens."""
        return where(self.sound, self.axes, x, axes, 0.0)

    def outputs(self, y: Array, axes: str) -> Array:
        """y with zeros for padding and NaN for what is lost."""
        kept = _expanded(self.present, "BT", self.axes) & ~self.lost
        fill = jnp.where(self.lost, jnp.nan, 0.0).astype(y.dtype)
        return where(kept, self.axes, y, axes, _expanded(fill, self.axes, axes))

    def state_before(self, state: Array, axes: str) -> Array:
        """The state before the first token, zero where it is broken."""
        row = self.axes.replace("T", "")
        return where(~self.broken_state, row, state, axes, 0.0)

    def state_after(self, state: Array, axes: str) -> Array:
        """The state after the last token, NaN where it is lost."""
        row = self.axes.replace("T", "")
        return where(~self.lost_state, row, state, axes, jnp.nan)


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


def where(
    flags: Bool[Array, "..."],
    flag_axes: str,
    x: Array,
    axes: str,
    other: ArrayLike,
) -> Array:
    """x where the flags of its axes are set, and another value elsewhere."""
    other = jnp.asarray(other, x.dtype)
    return jnp.where(_expanded(flags, flag_axes, axes), x, other)


def _all_finite(arrays: Iterable[tuple[str, Array]], kept: str) -> Bool[Array, "..."]:
    """Whether all numbers are finite that share an index of the kept axes."""

    def flags(axes: str, x: Array) -> Array:
        if axes[-1] not in kept:
            # XLA for CPUs multiplies by a vector faster than it reduces. The terms are
            # too small for their sum to overflow; but TPUs round operands to bfloat16,
            # where the largest 0.4% of float32's range may become infinite.
            weights = np.linspace(1, 2, x.shape[-1]) * 2.0**-100
            x, axes = x @ weights.astype(x.dtype), axes[:-1]
        others = [i for i, axis in enumerate(axes) if axis not in kept]
        left = "".join(axis for axis in axes if axis in kept)
        return _expanded(jnp.all(jnp.isfinite(x), others), left, kept)

    flags_of = [flags(axes, x) for axes, x in arrays]
    return functools.reduce(operator.and_, flags_of, jnp.asarray(True))


def _expanded(x: Array, axes: str, onto: str) -> Array:
    """x with axes of size one where it lacks those of another array."""
    missing = [i for i, axis in enumerate(onto) if axis not in axes]
    return jnp.expand_dims(x, missing)
