"""Decayed scores of a head's chunk and their gradients on a TPU; see `scores.py`.

Each kind of decay is a class, with one object for each head's chunk. The methods are
generators that yield between stages, so that heads run in turns (`tiles.in_turns`).
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
    """The operands of a chunk after the decay.

    Attributes:
        pairs: P, with queries in the rows; transposed for the gradient.
        q: queries to multiply the state before the chunk.
        k: keys to add to the state after the chunk.
        total: the factor by which the state's channels shrink; None for 1.
    """

    pairs: Float[Array, "C C"]
    q: Float[Array, "C K"]
    k: Float[Array, "C K"]
    total: Float[Array, "1 K"] | Float[Array, "1 1"] | None


class ScoreGradients(NamedTuple):
    """The gradients for the scores; `total` as if every channel had its own factor."""

    pairs: Float[Array, "C C"]
    transposed_pairs: Float[Array, "C C"]
    q: Float[Array, "C K"]
    k: Float[Array, "C K"]
    total: Float[Array, "1 K"]


class NoDecay:
    """No decay."""

    def __init__(self, exact: bool):
        self.exact, self.product = exact, product_of(exact)

    def scores(self, q, k):
        """The scores."""
        return self._scores(q, k, transposed=False)

    def _scores(self, q, k, transposed):
        pairs = self.all_pairs(q, k, transposed)
        yield
        return Scores(kept(pairs, _seen(pairs, transposed)), q, k, None)

    def gradients(self, q, k, score_gradients: Callable[[], ScoreGradients]):
        """The scores with `pairs` transposed; gradients for q, k and the log decays.

        Args:
            score_gradients: computes the gradients for the scores; called where their
              products fill gaps.
        """
        scores = yield from self._scores(q, k, transposed=True)
        d = score_gradients()
        yield
        d_q = d.q + self.product(kept(d.pairs, _seen(d.pairs)), k)
        yield
        d_pairs = kept(d.transposed_pairs, _seen(d.transposed_pairs, transposed=True))
        return scores, (d_q, d.k + self.product(d_pairs, q), None)

    def all_pairs(self, q, k, transposed):
        """q k^T, or its transpose."""
        return self.product(*((k, q) if transposed else (q, k)), transposed=True)


class HeadDecay(NoDecay):
    """One decay for all channels: a matrix of factors for the pairs of tokens."""

    def __init__(self, exact: bool, gates: Gates, j: int):
        super().__init__(exact)
        assert gates.hi is not None and gates.lo is not None and gates.total is not None
        self.gates, self.j, row = gates, j, slice(j, j + 1)
        self.sums, self.total = (gates.hi[row], gates.lo[row]), gates.total[row]

    def _scores(self, q, k, transposed):
        self.pairs = self.all_pairs(q, k, transposed)
        yield
        gates = self.gates
        entry, log = gates.entry_and_log(self.j, gates.columns, *self.sums)
        self.entry = fit(entry, q.shape[1])
        self.exit = fit(gates.exit_column(self.j), k.shape[1])
        # Log decays are at most 0, so this is right in both orders of two tokens.
        self.within = jnp.exp(-jnp.abs(log))
        yield
        pairs = kept(self.pairs * self.within, _seen(log, transposed))
        q_entry = self.entry * q.astype(jnp.float32)
        k_exit = self.exit * k.astype(jnp.float32)
        return Scores(pairs, q_entry, k_exit, self.total)

    def gradients(self, q, k, score_gradients: Callable[[], ScoreGradients]):
        """See `NoDecay.gradients`; that of the log decays is four rows for `operation`.

        They are for the intervals within the chunk that contain a token, for those from
        the chunk's start to it and from it to the chunk's end, and, to be summed over
        the lanes, for the whole chunk.
        """
        scores = yield from self._scores(q, k, transposed=True)
        d = score_gradients()
        yield
        entry, exit = self.entry * d.q, self.exit * d.k
        transposed = d.transposed_pairs
        transposed = kept(transposed * self.within, _seen(transposed, transposed=True))
        pairs = kept(d.pairs * self.within, _seen(d.pairs))
        yield
        d_q = entry + self.product(pairs, k)
        d_k = exit + self.product(transposed, q)
        yield
        row, lane = iota(transposed.shape, 0), iota(transposed.shape, 1)
        crossing = dot_indicator(transposed * self.pairs, row >= lane, self.exact)
        within = jnp.sum(jnp.where(row < lane, crossing, 0.0), 0, keepdims=True)
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        sums = lane_sums([entry * q, exit * k], self.exact)
        total = self.total * to_lanes(d.total)
        yield
        return scores, (d_q, d_k, (within, sums[:1], sums[1:2], total))


class ChannelDecay(NoDecay):
    """A decay for every channel; pairs of tokens by the size of halves they join."""

    def __init__(self, exact: bool, g: Float[Array, "C K"]):
        super().__init__(exact)
        self.g = g

    def scores(self, q, k):
        steps, entry, exit = levels(self.g)
        pairs = self.all_pairs(q, k, transposed=False)
        q, k, distance = q.astype(jnp.float32), k.astype(jnp.float32), _distance(pairs)
        for halves, start, end in steps:
            left, right = halves.left, halves.right
            decayed_k = halves.with_left(k, left(k) * end)
            new = self.product(right(q) * start, decayed_k, transposed=True)
            # Pairs of larger blocks are written too; a later level corrects them.
            new = jnp.where(right(distance) >= halves.size, new, right(pairs))
            pairs = halves.with_right(pairs, new)
            yield
        return Scores(kept(pairs, _seen(pairs)), q * entry, k * exit, entry[-1:])

    def gradients(self, q, k, score_gradients: Callable[[], ScoreGradients]):
        """See `NoDecay.gradients`; that of the log decays is per token and channel.

        The gradient for the logarithm of a factor is a query times the query's
        gradient, or a key times the key's. From the chunk down to its tokens, `d_q` and
        `d_k` belong to the factors from the start of a token's block and to its end,
        `total` is the gradient for the factors across the block.
        """
        steps, entry, exit = levels(self.g)
        yield
        d = score_gradients()
        pairs = self.all_pairs(q, k, transposed=True)
        q, k, distance = q.astype(jnp.float32), k.astype(jnp.float32), _distance(pairs)
        d_q, d_k = d.q * entry, d.k * exit
        total = jnp.broadcast_to(entry[-1:] * d.total, (SUBLANES, q.shape[1]))
        yield
        for halves, start, end in reversed(steps):
            left, right = halves.left, halves.right
            crossing = halves.sums(left(d_k) * left(k), right(d_q) * right(q))
            total = halves.spread(total, 2) + halves.for_sums.swapped(crossing)
            k_left, q_right = left(k) * end, right(q) * start
            decayed_k = halves.with_left(k, k_left)
            decayed_q = halves.with_right(q, q_right)
            yield
            left_mask, right_mask = (
                _in_halves(x, halves.size) for x in (left(distance), right(distance))
            )
            if not halves.whole:  # both have the rows of both halves
                left_mask &= _seen(distance, transposed=True)
                right_mask &= _seen(distance)
            new = self.product(k_left, decayed_q, transposed=True)
            pairs = halves.with_left(pairs, jnp.where(left_mask, new, left(pairs)))
            d_left = kept(left(d.transposed_pairs), left_mask)
            d_right = kept(right(d.pairs), right_mask)
            more_q = start * self.product(d_right, decayed_k)
            more_k = end * self.product(d_left, decayed_q)
            d_q = halves.with_right(d_q, right(d_q) + more_q)
            d_k = halves.with_left(d_k, left(d_k) + more_k)
        yield
        diagonal = self.product(kept(d.pairs, distance == 0), jnp.ones_like(k))
        pairs = kept(pairs, _seen(pairs, transposed=True))
        scores = Scores(pairs, q * entry, k * exit, entry[-1:])
        return scores, (d_q + diagonal * k, d_k + diagonal * q, d_q * q + total)


def decays_of(ref, sizes: Sizes) -> list[NoDecay]:
    """The decays of a grid step's heads, from a block of the `g` of `forward`."""
    heads, exact = range(sizes.heads), sizes.exact
    if sizes.decay is None:
        return [NoDecay(exact) for _ in heads]
    if sizes.decay == "channel":
        return [ChannelDecay(exact, ref[:, sizes.key_lanes(h)]) for h in heads]
    decays = []
    for group in groups(sizes.heads):
        gates = Gates.read(ref, group, with_beta=False, more_columns=True)
        decays += [HeadDecay(exact, gates, j) for j in range(len(group))]
    return decays


def product_of(exact: bool):
    """A function for x y, or x y^T, with float32 or bfloat16 operands."""
    operand = jnp.float32 if exact else jnp.bfloat16

    def product(x, y, transposed=False):
        precision = EXACT if exact else None
        return dot(x.astype(operand), y.astype(operand), transposed, precision)

    return product


def _distance(pairs):
    """The XOR of two tokens' indices.

    Its highest bit is the size of the halves of the smallest block with both tokens.
    """
    return iota(pairs.shape, 0) ^ iota(pairs.shape, 1)


def _in_halves(distance, size):
    """Which pairs of tokens are in the two halves, of `size` tokens, of one block."""
    return distance & -size == size


def kept(x, condition):
    """x, float32, where the condition holds, else 0."""
    # By its bits, not by `jnp.where`: the estimator of v5e fails on products of those.
    mask = jnp.where(condition, jnp.int32(-1), jnp.int32(0))
    bits = lax.bitcast_convert_type(x, jnp.int32) & mask
    return lax.bitcast_convert_type(bits, jnp.float32)


def _seen(pairs, transposed=False):
    """Mask of the pairs whose key is no later than the query."""
    row, lane = iota(pairs.shape, 0), iota(pairs.shape, 1)
    return row <= lane if transposed else row >= lane
