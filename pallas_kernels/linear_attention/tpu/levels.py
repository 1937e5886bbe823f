"""Decays a channel within blocks of 1, 2, 4, .. C tokens.

Between the halves of a block the decay from key j to query i is a product of two
factors, each at most 1: from j to the block's middle, and from there to i. The blocks
of one size are the diagonal of one product of all queries and all keys.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.tpu.tiles import SUBLANES, gather, iota


class Halves(NamedTuple):
    """Rows of the left and the right halves of blocks, of so many rows each.

    Where a half is whole registers, its rows are taken and put without cost, and only
    they are computed. Else all rows are, and what the others hold is not to be read.
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
        """x of its `left` and `right`."""
        if not self.whole:  # the same in every register
            is_right = (iota((SUBLANES, left.shape[1]), 0) & self.size) > 0
            registers = zip(_registers(left), _registers(right), strict=True)
            return jnp.concatenate([jnp.where(is_right, r, l) for l, r in registers], 0)
        starts = range(0, left.shape[0], self.size)
        both = [x[i : i + self.size] for i in starts for x in (left, right)]
        return jnp.concatenate(both, 0)

    def with_left(self, x, left):
        """x with other rows on the left; where halves are no registers, `left`."""
        return self.joined(left, self.right(x)) if self.whole else left

    def with_right(self, x, right):
        return self.joined(self.left(x), right) if self.whole else right

    def swapped(self, x):
        """Each half in the other's place."""
        if self.whole:
            return self.joined(self.right(x), self.left(x))
        row = iota((SUBLANES, x.shape[1]), 0) ^ self.size
        return jnp.concatenate([gather(x, row, 0) for x in _registers(x)], 0)

    def sums(self, left, right):
        """Sums over the rows of each half, in a register of rows or in all its rows."""
        if self.whole:
            sums = (self._own_sums(x) for x in (left, right))
            return self.of_sums.joined(*sums)
        sums, distance = self.joined(left, right), 1
        while distance < self.size:
            sums, distance = sums + Halves(distance).swapped(sums), 2 * distance
        return sums

    @property
    def of_sums(self):
        """The halves of what has a register of equal rows for each."""
        return Halves(min(self.size, SUBLANES))

    def spread(self, x, times):
        """Each register of equal rows so many times; x, where halves are none."""
        if not self.whole:
            return x
        return jnp.concatenate([r for r in _registers(x) for _ in range(times)], 0)

    def _every_other(self, x, first):
        starts = range(first, x.shape[0], 2 * self.size)
        return jnp.concatenate([x[i : i + self.size] for i in starts], 0)

    def _own_sums(self, x):
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
    """Those of halves of 1, 2, .. C / 2 tokens, by doubling, and the chunk's.

    Returns:
        The levels, and the decays from the chunk's start to after each token and from
        after each token to its end.
    """
    start = total = jnp.exp(g)
    end, found, size = jnp.ones_like(start), [], 1
    while size < g.shape[0]:
        halves, size = Halves(size), 2 * size
        level = Level(halves, halves.right(start), halves.left(end))
        found.append(level)
        others = halves.of_sums.swapped(total)
        total = total * others
        if halves.whole:  # of equal rows one register is enough
            total = halves.of_sums.left(total)
        others = halves.spread(others, halves.size // SUBLANES)
        start = halves.joined(halves.left(start), halves.right(others) * level.start)
        end = halves.joined(level.end * halves.left(others), halves.right(end))
    return found, start, end


def _registers(x):
    """x by whole registers of rows."""
    return [x[i : i + SUBLANES] for i in range(0, x.shape[0], SUBLANES)]
