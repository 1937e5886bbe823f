"""Decays per channel within blocks of 1, 2, 4, .. C tokens.

Between the halves of a block the decay from key j to query i is a product of two
factors, each at most 1: from j to the block's middle, and from there to i. All blocks
of one size are on the diagonal of one product of all queries and all keys.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.tpu.tiles import SUBLANES, gather, iota


class Halves(NamedTuple):
    """Rows of the left and the right halves of blocks, with `size` rows in a half.

    If a half is whole registers, its rows are read and written without cost, and only
    they are computed. Otherwise all rows are computed, and those of the other half are
    meaningless.
    """

    size: int

    @property
    def whole(self) -> bool:
        """Whether a half is whole registers."""
        return self.size >= SUBLANES

    def left(self, x):
        return self._every_other(x, 0) if self.whole else x

    def right(self, x):
        return self._every_other(x, self.size) if self.whole else x

    def joined(self, left, right):
        """x from its `left` and `right`."""
        if not self.whole:  # every register has the same pattern
            is_right = (iota((SUBLANES, left.shape[1]), 0) & self.size) > 0
            registers = zip(_registers(left), _registers(right), strict=True)
            return jnp.concatenate([jnp.where(is_right, r, l) for l, r in registers], 0)
        starts = range(0, left.shape[0], self.size)
        both = [x[i : i + self.size] for i in starts for x in (left, right)]
        return jnp.concatenate(both, 0)

    def with_left(self, x, left):
        """x with the left rows replaced; just `left` if halves are not registers."""
        return self.joined(left, self.right(x)) if self.whole else left

    def with_right(self, x, right):
        return self.joined(self.left(x), right) if self.whole else right

    def swapped(self, x):
        """x with the two halves of each block exchanged."""
        if self.whole:
            return self.joined(self.right(x), self.left(x))
        row = iota((SUBLANES, x.shape[1]), 0) ^ self.size
        return jnp.concatenate([gather(x, row, 0) for x in _registers(x)], 0)

    def sums(self, left, right):
        """Sums over the rows of each half, in all rows of a register or of the half."""
        if self.whole:
            sums = (self._row_sums(x) for x in (left, right))
            return self.for_sums.joined(*sums)
        sums, distance = self.joined(left, right), 1
        while distance < self.size:
            sums, distance = sums + Halves(distance).swapped(sums), 2 * distance
        return sums

    @property
    def for_sums(self):
        """The halves of arrays with one register of equal rows for each half."""
        return Halves(min(self.size, SUBLANES))

    def spread(self, x, times):
        """Repeat each register of equal rows; just x if halves are not registers."""
        if not self.whole:
            return x
        return jnp.concatenate([r for r in _registers(x) for _ in range(times)], 0)

    def _every_other(self, x, first):
        starts = range(first, x.shape[0], 2 * self.size)
        return jnp.concatenate([x[i : i + self.size] for i in starts], 0)

    def _row_sums(self, x):
        blocks = x.reshape(-1, self.size, x.shape[1])
        sums = jnp.sum(blocks, 1, keepdims=True)
        shape = blocks.shape[0], SUBLANES, x.shape[1]
        return jnp.broadcast_to(sums, shape).reshape(-1, x.shape[1])


class Level(NamedTuple):
    """The decays in blocks of two halves.

    Attributes:
        halves: the rows of the halves.
        start: from the block's middle to after each token on the right.
        end: from after each token on the left to the block's middle.
    """

    halves: Halves
    start: Float[Array, "rows K"]
    end: Float[Array, "rows K"]


def levels(g: Float[Array, "C K"]) -> tuple[list[Level], Array, Array]:
    """The levels with halves of 1, 2, .. C / 2 tokens, by doubling, and the chunk's.

    Returns:
        The levels, and the decays from the chunk's start to after each token and from
        after each token to the chunk's end.
    """
    start = total = jnp.exp(g)
    end, result, size = jnp.ones_like(start), [], 1
    while size < g.shape[0]:
        halves, size = Halves(size), 2 * size
        level = Level(halves, halves.right(start), halves.left(end))
        result.append(level)
        others = halves.for_sums.swapped(total)
        total = total * others
        if halves.whole:  # the registers of both halves are now equal
            total = halves.for_sums.left(total)
        others = halves.spread(others, halves.size // SUBLANES)
        start = halves.joined(halves.left(start), halves.right(others) * level.start)
        end = halves.joined(level.end * halves.left(others), halves.right(end))
    return result, start, end


def _registers(x):
    """x divided into whole registers of rows."""
    return [x[i : i + SUBLANES] for i in range(0, x.shape[0], SUBLANES)]
