"""What a decay does to the scores of a head's chunk, on TPU; see `scores.py`.

A kind of decay is a class, one head's chunk an object of it. The methods are generators
that yield between stages, so that heads run in turns (`tiles.in_turns`).
"""

from typing import NamedTuple

import jax.numpy as jnp
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
    indicator,
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

    def scores(self, q, k, turned=False):
        """The scores, for the gradient with `pairs` turned."""
        pairs = self.meet(q, k, turned)
        yield
        return Scores(kept(pairs, _seen(pairs, turned)), q, k, None)

    def gradients(self, q, k, d: ScoreGradients):
        """Those of q, k and of the log decays, after `scores`."""
        d_q = d.q + self.product(kept(d.pairs, _seen(d.pairs)), k)
        yield
        turned = kept(d.turned, _seen(d.turned, turned=True))
        return d_q, d.k + self.product(turned, q), None

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

    def scores(self, q, k, turned=False):
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

    def gradients(self, q, k, d: ScoreGradients):
        """The log decays' gradient comes as rows for `operation`.

        For intervals within the chunk that hold a token, for those from the chunk's
        start to it and from it to the chunk's end, and, to be summed over the lanes,
        for the whole chunk.
        """
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
        return d_q, d_k, (within, sums[:1], sums[1:2], total)


class ChannelDecay(NoDecay):
    """A decay for every channel: pairs of tokens by the size of blocks they part in."""

    def __init__(self, exact: bool, g: Float[Array, "C K"]):
        super().__init__(exact)
        self.g = g

    def scores(self, q, k, turned=False):
        self.levels, self.entry, self.exit = levels(self.g)
        pairs = self.meet(q, k, turned)
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        apart = _apart(pairs)
        for halves, start, end in self.levels:
            right, left = halves.right(q) * start, halves.left(k) * end
            if turned:
                rows, put = halves.left, halves.with_left
                met = self.product(left, halves.with_right(q, right), transposed=True)
            else:
                rows, put = halves.right, halves.with_right
                met = self.product(right, halves.with_left(k, left), transposed=True)
            # Also where they are farther apart, which a later level puts right.
            met = jnp.where(rows(apart) >= halves.size, met, rows(pairs))
            pairs = put(pairs, met)
            yield
        pairs = kept(pairs, _seen(pairs, turned))
        return Scores(pairs, q * self.entry, k * self.exit, self.entry[-1:])

    def gradients(self, q, k, d: ScoreGradients):
        """The log decays' gradient comes a token and channel.

        The gradient for the logarithm of a factor is a query times the query's
        gradient, or a key times the key's. From the chunk down, `d_q` and `d_k` are
        those for the factors from the start of a token's block and to its end, `total`
        is that for the factors across the block.
        """
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        d_q, d_k = d.q * self.entry, d.k * self.exit
        total = jnp.broadcast_to(self.entry[-1:] * d.total, (SUBLANES, q.shape[1]))
        pairs = jnp.where(_seen(d.pairs), d.pairs, 0.0)
        turned = jnp.where(_seen(d.turned, turned=True), d.turned, 0.0)
        apart = _apart(pairs)
        for halves, start, end in reversed(self.levels):
            left, right = halves.left, halves.right
            crossing = halves.sums(left(d_k) * left(k), right(d_q) * right(q))
            total = halves.spread(total, 2) + halves.of_sums.swapped(crossing)
            of_right = kept(right(pairs), right(apart) >= halves.size)
            of_left = kept(left(turned), left(apart) >= halves.size)
            pairs = halves.with_right(pairs, right(pairs) - of_right)
            turned = halves.with_left(turned, left(turned) - of_left)
            yield
            k_met = halves.with_left(k, left(k) * end)
            q_met = halves.with_right(q, right(q) * start)
            more_q = start * self.product(of_right, k_met)
            more_k = end * self.product(of_left, q_met)
            d_q = halves.with_right(d_q, right(d_q) + more_q)
            d_k = halves.with_left(d_k, left(d_k) + more_k)
        yield
        own = self.product(pairs, jnp.ones_like(k))
        return d_q + own * k, d_k + own * q, d_q * q + total


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


def kept(x, condition):
    """x where the condition holds, else 0; x is finite."""
    # Not by a selection: the estimator of v5e fails on products of masks.
    return x * indicator(condition, jnp.float32)


def _seen(pairs, turned=False):
    """Where a key is no later than the query."""
    row, lane = iota(pairs.shape, 0), iota(pairs.shape, 1)
    return row <= lane if turned else row >= lane
