"""Pieces of TPU kernels: products in parts, and operations along the lanes.

A vector register of a TPU holds 8 sublanes of 128 lanes. There are few units that move
values between lanes; where the matrix unit is idle, the kernels move them by products
with zeros and ones instead.
"""

import itertools

import jax.numpy as jnp
from jax import lax

from pallas_kernels.products import EXACT

LANES, SUBLANES = 128, 8


def dot(x, y, transposed=False, precision=None):
    """x y, or x y^T, accumulated in float32."""
    contracted = ((1,), (1 if transposed else 0,))
    return lax.dot_general(
        x,
        y,
        (contracted, ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def leading_part(x):
    """x truncated to the significand of bfloat16, in float32.

    By its bits: chips without bfloat16 arithmetic would need two conversions, to
    bfloat16 and back, and their compiler removes such a pair.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
    return lax.bitcast_convert_type(bits, jnp.float32)


def three_parts(x):
    """Three numbers that bfloat16 holds exactly and whose sum is x."""
    one = leading_part(x)
    two = leading_part(x - one)
    return one, two, x - one - two


def with_rest(x, y, exact):
    """The factors of the product x y; unless it is exact, y is in two parts."""
    if exact:
        return x, y
    hi = leading_part(y)
    parts = jnp.concatenate([hi, y - hi], 0).astype(jnp.bfloat16)
    return jnp.concatenate([x, x], 1).astype(jnp.bfloat16), parts


def left_in_parts(x, start, size, exact):
    """The left factor of a product with `right_in_parts`: lanes `start` on of x.

    The parts are [hi lo hi lo] here and [hi; hi; lo; lo] in the right factor: a product
    of float32 to about 16 bits in one pass of the matrix unit.

    Args:
        size: the number of lanes, a quarter of all.
        exact: whether to leave both in float32, for an exact product.
    """
    if exact:
        return x[:, start : start + size]
    lane = iota(x.shape, 1)
    x = gather(x, start + lane % size)
    hi = leading_part(x)
    return jnp.where(lane // size % 2 == 1, x - hi, hi).astype(jnp.bfloat16)


def right_in_parts(x, exact):
    """The right factor of a product with `left_in_parts`."""
    if exact:
        return x
    hi = leading_part(x)
    lo = x - hi
    return jnp.concatenate([hi, hi, lo, lo], 0).astype(jnp.bfloat16)


def dot_indicator(x, condition, exact):
    """x times the zeros and ones of a condition, exactly or to about 16 bits of x."""
    if exact:
        return dot(x, indicator(condition, jnp.float32), precision=EXACT)
    hi = leading_part(x)
    ones = indicator(condition)
    return dot(hi.astype(ones.dtype), ones) + dot((x - hi).astype(ones.dtype), ones)


def lane_sums(terms, exact):
    """Sums of each term along its lanes, exactly or to about 16 bits.

    Args:
        terms: at most 16 arrays with the same number of rows.

    Returns:
        [16, rows], with the sums of term i in row i.
    """
    x, ends = jnp.concatenate(terms, 1), []
    for term in terms:
        ends.append(term.shape[1] + (ends[-1] if ends else 0))
    shape = 16, x.shape[1]
    lane = iota(shape, 1)
    term = sum((lane >= end).astype(jnp.int32) for end in ends[:-1])
    # Not by `jnp.where`: the estimator of v5e fails on products of masks.
    ones = (1 - jnp.minimum(jnp.abs(iota(shape, 0) - term), 1)).astype(jnp.float32)
    if exact:
        return dot(ones, x, transposed=True, precision=EXACT)
    hi, ones = leading_part(x), ones.astype(jnp.bfloat16)
    rest = dot(ones, (x - hi).astype(ones.dtype), transposed=True)
    return dot(ones, hi.astype(ones.dtype), transposed=True) + rest


class RowSums:
    """Sums over the rows of SUBLANES registers, with the sum of register i in row i.

    Registers are added in ascending or descending order of their rows, and merged as
    early as possible, so that few are live.
    """

    def __init__(self):
        self._waiting = []

    def add(self, row: int, x):
        """Add x [a multiple of SUBLANES, LANES], whose sum is to be in row `row`."""
        x = sum(x[i : i + SUBLANES] for i in range(0, x.shape[0], SUBLANES))
        size = 1
        while self._waiting and self._waiting[-1][0] == size:
            _, other_row, other = self._waiting.pop()
            x = _merged(*((x, other) if row < other_row else (other, x)), size)
            row, size = min(row, other_row), 2 * size
        self._waiting.append((size, row, x))

    @property
    def sums(self):
        """The sums [SUBLANES, LANES], after all registers are added."""
        ((size, _, x),) = self._waiting
        assert size == SUBLANES
        return x


def _merged(low, high, distance):
    """Add rows `distance` apart: those of `low` in the lower rows, of `high` above."""
    row = iota(low.shape, 0)
    upper = (row & distance) > 0
    crossing = jnp.where(upper, low, high)
    return jnp.where(upper, high, low) + gather(crossing, row ^ distance, 0)


def gather(x, index, axis=1):
    """x[:, index], row by row, or x[index], column by column."""
    return jnp.take_along_axis(x, index, axis=axis, mode="promise_in_bounds")


def fit(x, lanes):
    """x, which is equal in all lanes, with `lanes` lanes."""
    if lanes <= LANES:
        return x[:, :lanes]
    return jnp.concatenate([x] * (lanes // LANES), 1)


def to_lanes(x):
    """Pad or add up [1, size] to [1, LANES] with the same sum."""
    if x.shape[1] < LANES:
        return jnp.concatenate([x, jnp.zeros((1, LANES - x.shape[1]), x.dtype)], 1)
    return sum(x[:, i : i + LANES] for i in range(0, x.shape[1], LANES))


def to_rows(x, rows):
    """Pad x with zeros to `rows` rows."""
    missing = rows - x.shape[0]
    if not missing:
        return x
    return jnp.concatenate([x, jnp.zeros((missing, x.shape[1]), x.dtype)], 0)


def in_turns(generators):
    """Run generators to their ends, one step of each in turn.

    The compiler's schedule follows the order of the program: what should overlap, such
    as the stages of independent heads, must be adjacent in it.
    """
    for _ in itertools.zip_longest(*generators):
        pass


def store_rows(ref, start, lanes, x):
    """Write x from row `start` on; rows past the end of `ref` are dropped."""
    rows = min(x.shape[0], ref.shape[0] - start)
    if rows > 0:
        ref[start : start + rows, lanes] = x[:rows].astype(ref.dtype)


def iota(shape, axis):
    """The index along an axis."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def indicator(condition, dtype=jnp.bfloat16):
    """1 where the condition holds, else 0."""
    return jnp.where(condition, 1.0, 0.0).astype(dtype)
