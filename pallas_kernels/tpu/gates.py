"""Decays and step sizes of a chunk, in the TPU kernels' lanes and sublanes."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.tpu.tiles import LANES as KEYS
from pallas_kernels.tpu.tiles import dot, indicator, iota, three_parts

NEVER = -128.0  # a log decay whose factor is 0 in float32


def running_sum(g: Float[Array, "*batch KEYS"]) -> tuple[Array, Array]:
    """Sums of g up to each key as hi + lo, with twice the precision of float32.

    The difference of two sums, taken part by part, is then accurate even after a strong
    decay.
    """
    hi, lo, distance = g, jnp.zeros_like(g), 1

    def before(x):
        pad = [(0, 0)] * (x.ndim - 1) + [(distance, 0)]
        return jnp.pad(x[..., :-distance], pad)

    while distance < g.shape[-1]:
        total = hi + before(hi)
        part = total - hi
        rest = (hi - (total - part)) + (before(hi) - part)
        hi, lo, distance = total, lo + before(lo) + rest, 2 * distance
    return hi, lo


class Gates(NamedTuple):
    """The gates of a group of heads along the keys, [heads, KEYS].

    Attributes:
        beta: step sizes, if there are any.
        hi, lo: the log decay from the chunk's start to after each key is hi + lo.
        exit: the decay from after each key to the chunk's end.
        total: the decay of the whole chunk, [heads, 1].
        columns: [KEYS, KEYS], in whose lanes are rows of each head, transposed: three
          parts of hi, then lo, ones and, with `more_columns`, three parts each of exit
          and beta.
    """

    beta: Array | None = None
    hi: Array | None = None
    lo: Array | None = None
    exit: Array | None = None
    total: Array | None = None
    columns: Array | None = None

    @classmethod
    def read(
        cls, ref, group: range, with_beta: bool = True, more_columns: bool = False
    ):
        """Read the gates of a group of heads from the rows beta, hi and lo of `ref`.

        Args:
            with_beta: whether there is a row beta.
            more_columns: whether `columns` has exit and beta too.
        """
        heads = slice(group[0], group[-1] + 1)
        rows = [ref[i, heads, :] for i in range(ref.shape[0])]
        beta = rows.pop(0) if with_beta else None
        if not rows:
            columns = _transposed(three_parts(beta)) if more_columns else None
            return cls(beta, columns=columns)
        hi, lo = rows[:2]
        last = hi[:, KEYS - 1 :], lo[:, KEYS - 1 :]
        exit = jnp.exp((last[0] - hi) + (last[1] - lo))
        parts = [*three_parts(hi), lo, jnp.ones_like(lo)]
        if more_columns:
            parts += three_parts(exit)
            parts += three_parts(beta) if with_beta else []
        total = jnp.exp(last[0] + last[1])
        return cls(beta, hi, lo, exit, total, _transposed(parts))

    @property
    def count(self) -> int:
        """The number of heads."""
        gate = self.beta if self.hi is None else self.hi
        assert gate is not None
        return gate.shape[0]

    def entry_and_log(self, j: int, columns, hi, lo):
        """The rows' entry decay, and the log decay from the lanes' keys to the rows'.

        Products with zeros and ones bring the running sums to all lanes: exactly for
        the three parts of hi, while lo is as small as their rounding.

        Args:
            j: the head.
            columns: `columns`, or rows of it.
            hi, lo: the running sums at the keys in the lanes, [1, KEYS].
        """
        n = self.count
        columns = columns.astype(jnp.bfloat16)
        G = dot(columns, indicator(self._rows(0, 3, j)))
        row = iota((KEYS, KEYS), 0)
        lo_column, ones = row == 3 * n + j, row == 4 * n + j
        rest = jnp.where(lo_column, 1.0, jnp.where(ones, -lo, 0.0))
        log = (G - hi) + dot(columns, rest.astype(jnp.bfloat16))
        return jnp.exp(G), log

    def exit_column(self, j: int):
        """`exit` of a head, [KEYS, KEYS], equal in all lanes."""
        return dot(self.columns, indicator(self._rows(5, 8, j)))

    def beta_column(self, j: int):
        """`beta` of a head, [KEYS, KEYS], equal in all lanes."""
        first = 0 if self.hi is None else 8
        return dot(self.columns, indicator(self._rows(first, first + 3, j)))

    def _rows(self, first, end, j):
        """Mask of the rows of a factor that meet parts `first` to `end` of head j."""
        n = self.count
        row = iota((KEYS, KEYS), 0)
        return (row >= first * n) & (row < end * n) & (row % n == j)


def _transposed(parts):
    """Stack parts [heads, KEYS] and transpose them into the lanes of [KEYS, KEYS]."""
    unused = KEYS - len(parts) * parts[0].shape[0]
    parts = [*parts, jnp.zeros((unused, KEYS), jnp.float32)]
    return jnp.concatenate(parts, 0).T.astype(jnp.bfloat16)
