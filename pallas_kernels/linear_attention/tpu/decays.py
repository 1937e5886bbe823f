"""What a decay does to the scores of a head's chunk, on TPU; see `scores.py`.

A kind of decay is a class, one head's chunk an object of it. The methods are generators
that yield between stages, so that heads run in turns (`tiles.in_turns`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.linear_attention.tpu.levels import levels
from pallas_kernels.linear_attention.tpu.sizes import Sizes
from pallas_kernels.products import EXACT
from pallas_kernels.tpu.gates import Gates
from pallas_kernels.tpu.limits import groups
from pallas_kernels.tpu.tiles import (
    SUBLANES,
    dot,
    dot_indicator,
    fit,
    iota,
    lane_sums,
    to_lanes,
)


class Scores(NamedTuple):
    """All that a decay does in a chunk.

    Attributes:
        pairs: P, queries in the rows; turned for the gradient.
        q: queries as they meet the state before the chunk.
        k: keys as they enter the state after the chunk.
        total: the factor by which the state's channels shrink; None for one.
    """

    pairs: Float[Array, "C C"]
    q: Float[Array, "C K"]
    k: Float[Array, "C K"]
    total: Float[Array, "1 K"] | Float[Array, "1 1"] | None


class ScoreGradients(NamedTuple):
    """The gradients for the scores, `pairs` both ways; `total` as a channel's own."""

    pairs: Float[Array, "C C"]
    turned: Float[Array, "C C"]
    q: Float[Array, "C K"]
    k: Float[Array, "C K"]
    total: Float[Array, "1 K"]


class NoDecay:
    """All is kept."""

    def __init__(self, exact: bool):
        self.exact, self.product = exact, product_of(exact)

    def scores(self, q, k):
        """The scores."""
        return self._scores(q, k, turned=False)

    def _scores(self, q, k, turned):
        pairs = self.meet(q, k, turned)
        yield
        return Scores(kept(pairs, _seen(pairs, turned)), q, k, None)

    def gradients(self, q, k, of_scores: Callable[[], ScoreGradients]):
        """The scores with `pairs` turned; gradients of q, k and of the log decays.

        Args:
            of_scores: computes the gradients for the scores; called where their
              products fill gaps.
        """
        scores = yield from self._scores(q, k, turned=True)
        d = of_scores()
        yield
        d_q = d.q + self.product(kept(d.pairs, _seen(d.pairs)), k)
        yield
        turned = kept(d.turned, _seen(d.turned, turned=True))
        return scores, (d_q, d.k + self.product(turned, q), None)

    def meet(self, q, k, turned):
        """q k^T, or turned."""
        return self.product(*((k, q) if turned else (q, k)), transposed=True)


class HeadDecay(NoDecay):
    """One decay for all channels: a matrix of factors for the pairs of tokens."""

    def __init__(self, exact: bool, gates: Gates, j: int):
        super().__init__(exact)
        assert gates.hi is not None and gates.lo is not None and gates.total is not None
        self.gates, self.j, row = gates, j, slice(j, j + 1)
        self.sums, self.total = (gates.hi[row], gates.lo[row]), gates.total[row]

    def _scores(self, q, k, turned):
        self.pairs = self.meet(q, k, turned)
        yield
        gates = self.gates
        entry, log = gates.entry_and_log(self.j, gates.columns, *self.sums)
        self.entry = fit(entry, q.shape[1])
        self.exit = fit(gates.exit_column(self.j), k.shape[1])
        # Of two tokens one is later, and no decay grows: the matrix is symmetric.
        self.within = jnp.exp(-jnp.abs(log))
        yield
        pairs = kept(self.pairs * self.within, _seen(log, turned))
        q_entry = self.entry * q.astype(jnp.float32)
        k_exit = self.exit * k.astype(jnp.float32)
        return Scores(pairs, q_entry, k_exit, self.total)

    def gradients(self, q, k, of_scores: Callable[[], ScoreGradients]):
        """The log decays' gradient comes as rows for `operation`.

        For intervals within the chunk that hold a token, for those from the chunk's
        start to it and from it to the chunk's end, and, to be summed over the lanes,
        for the whole chunk.
        """
        scores = yield from self._scores(q, k, turned=True)
        d = of_scores()
        yield
        entry, exit = self.entry * d.q, self.exit * d.k
        turned = kept(d.turned * self.within, _seen(d.turned, turned=True))
        pairs = kept(d.pairs * self.within, _seen(d.pairs))
        yield
        d_q = entry + self.product(pairs, k)
        d_k = exit + self.product(turned, q)
        yield
        row, lane = iota(turned.shape, 0), iota(turned.shape, 1)
        crossing = dot_indicator(turned * self.pairs, row >= lane, self.exact)
        within = jnp.sum(jnp.where(row < lane, crossing, 0.0), 0, keepdims=True)
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        sums = lane_sums([entry * q, exit * k], self.exact)
        total = self.total * to_lanes(d.total)
        yield
        return scores, (d_q, d_k, (within, sums[:1], sums[1:2], total))


class ChannelDecay(NoDecay):
    """A decay for every channel: pairs of tokens by the size of blocks they part in."""

    def __init__(self, exact: bool, g: Float[Array, "C K"]):
        super().__init__(exact)
        self.g = g

    def scores(self, q, k):
        steps, entry, exit = levels(self.g)
        pairs = self.meet(q, k, turned=False)
        q, k, apart = q.astype(jnp.float32), k.astype(jnp.float32), _apart(pairs)
        for halves, start, end in steps:
            left, right = halves.left, halves.right
            k_met = halves.with_left(k, left(k) * end)
            met = self.product(right(q) * start, k_met, transposed=True)
            # Also where they are farther apart, which a later level puts right.
            met = jnp.where(right(apart) >= halves.size, met, right(pairs))
            pairs = halves.with_right(pairs, met)
            yield
        return Scores(kept(pairs, _seen(pairs)), q * entry, k * exit, entry[-1:])

    def gradients(self, q, k, of_scores: Callable[[], ScoreGradients]):
        """The log decays' gradient comes a token and channel.

        The gradient for the logarithm of a factor is a query times the query's
        gradient, or a key times the key's. From the chunk down, `d_q` and `d_k` are
        those for the factors from the start of a token's block and to its end, `total`
        is that for the factors across the block.
        """
        steps, entry, exit = levels(self.g)
        yield
        d = of_scores()
        pairs = self.meet(q, k, turned=True)
        q, k, apart = q.astype(jnp.float32), k.astype(jnp.float32), _apart(pairs)
        d_q, d_k = d.q * entry, d.k * exit
        total = jnp.broadcast_to(entry[-1:] * d.total, (SUBLANES, q.shape[1]))
        yield
        for halves, start, end in reversed(steps):
            left, right = halves.left, halves.right
            crossing = halves.sums(left(d_k) * left(k), right(d_q) * right(q))
            total = halves.spread(total, 2) + halves.of_sums.swapped(crossing)
            k_left, q_right = left(k) * end, right(q) * start
            k_met, q_met = halves.with_left(k, k_left), halves.with_right(q, q_right)
            yield
            here, there = (
                _parting(x, halves.size) for x in (left(apart), right(apart))
            )
            if not halves.whole:  # rows of both sides
                here, there = here & _seen(apart, turned=True), there & _seen(apart)
            met = self.product(k_left, q_met, transposed=True)
            pairs = halves.with_left(pairs, jnp.where(here, met, left(pairs)))
            of_left, of_right = kept(left(d.turned), here), kept(right(d.pairs), there)
            more_q = start * self.product(of_right, k_met)
            more_k = end * self.product(of_left, q_met)
            d_q = halves.with_right(d_q, right(d_q) + more_q)
            d_k = halves.with_left(d_k, left(d_k) + more_k)
        yield
        own = self.product(kept(d.pairs, apart == 0), jnp.ones_like(k))
        pairs = kept(pairs, _seen(pairs, turned=True))
        scores = Scores(pairs, q * entry, k * exit, entry[-1:])
        return scores, (d_q + own * k, d_k + own * q, d_q * q + total)


def decays_of(ref, sizes: Sizes) -> list[NoDecay]:
    """Those of a grid step's heads, from the gates' block as `forward` takes it."""
    heads, exact = range(sizes.heads), sizes.exact
    if sizes.decay is None:
        return [NoDecay(exact) for _ in heads]
    if sizes.decay == "channel":
        return [ChannelDecay(exact, ref[:, sizes.of_keys(h)]) for h in heads]
    decays = []
    for group in groups(sizes.heads):
        gates = Gates.read(ref, group, with_beta=False, more_columns=True)
        decays += [HeadDecay(exact, gates, j) for j in range(len(group))]
    return decays


def product_of(exact: bool):
    """x y, or x y^T, of float32 or of bfloat16 operands."""
    operand = jnp.float32 if exact else jnp.bfloat16

    def product(x, y, transposed=False):
        precision = EXACT if exact else None
        return dot(x.astype(operand), y.astype(operand), transposed, precision)

    return product


def _apart(pairs):
    """Of pairs of tokens; its highest bit is the size of the halves they are in."""
    return iota(pairs.shape, 0) ^ iota(pairs.shape, 1)


def _parting(apart, size):
    """Which pairs of tokens are in the two halves, of so many, of one block."""
    return apart & -size == size


def kept(x, condition):
    """x, float32, where the condition holds, else 0."""
    # By its bits, not by a selection: the estimator of v5e fails on products of those.
    mask = jnp.where(condition, jnp.int32(-1), jnp.int32(0))
    bits = lax.bitcast_convert_type(x, jnp.int32) & mask
    return lax.bitcast_convert_type(bits, jnp.float32)


def _seen(pairs, turned=False):
    """Where a key is no later than the query."""
    row, lane = iota(pairs.shape, 0), iota(pairs.shape, 1)
    return row <= lane if turned else row >= lane
