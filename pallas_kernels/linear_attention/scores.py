"""Decayed scores within a chunk and with its states, for each kind of decay.

Along channel c the decay from after token j to after token i is e^{D_ijc}, with D_ijc =
sum_{j < m <= i} g_mc, and the scores are

    P_ij = sum_c q_ic k_jc e^{D_ijc}      for j <= i, zero above the diagonal.

One decay for all channels is a factor of q_i.k_j. A decay per channel is not, and the
factors e^{G_i} and e^{-G_j} of its cumulative sums overflow. Between the two halves of
a block it can be split at the middle:

    e^{D_ij} = e^{D_i,mid} e^{D_mid,j}      for j <= mid < i

where both factors are at most 1 and products of only the decays they span. So the rows
of the right half and the columns of the left half need one matrix product, in blocks of
2, 4, .. C tokens.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.decay import Decay, decay, gradient
from pallas_kernels.products import Product


class Scores(NamedTuple):
    """The operands of a chunk after the decay.

    Attributes:
        pairs: P.
        q: queries to multiply the state before the chunk.
        k: keys to add to the state after the chunk.
        total: the factor by which each channel of the state shrinks, or one for all.
    """

    pairs: Float[Array, "*batch C C"]
    q: Float[Array, "*batch C K"]
    k: Float[Array, "*batch C K"]
    total: Float[Array, "*batch K"] | Float[Array, "*batch 1"]


def scores(
    product: Product,
    q: Float[Array, "*batch C K"],
    k: Float[Array, "*batch C K"],
    g: Float[Array, "*batch C"] | Float[Array, "*batch C K"] | None,
) -> Scores:
    """The scores; C is a power of two."""
    if g is None:
        pairs = jnp.tril(product("...ik,...jk->...ij", q, k))
        return Scores(pairs, q, k, jnp.ones((*q.shape[:-2], 1), product.result))
    q, k = q.astype(g.dtype), k.astype(g.dtype)
    if g.ndim < q.ndim:
        factors = decay(g)
        pairs = product("...ik,...jk->...ij", q, k) * factors.within
        scaled = _scaled(q, factors.entry), _scaled(k, factors.exit)
        return Scores(pairs, *scaled, factors.total[..., None])
    levels, (start, end) = _levels(g)
    return Scores(_pairs(product, q, k, levels), q * start, k * end, start[..., -1, :])


def score_gradients(
    product: Product,
    q: Float[Array, "*batch C K"],
    k: Float[Array, "*batch C K"],
    g: Float[Array, "*batch C"] | Float[Array, "*batch C K"] | None,
    pairs: Float[Array, "*batch C C"],
    d: Scores,
) -> tuple[Array, Array, Array | None]:
    """Gradients for q, k and g, from P and the gradients for the scores.

    Args:
        d: `d.pairs` is ignored above the diagonal; `d.total` [*batch, K] is the
          gradient as if every channel had its own factor.
    """
    if g is None:
        M = jnp.tril(d.pairs)
        d_q = d.q + product("...ij,...jk->...ik", M, k)
        return d_q, d.k + product("...ij,...ik->...jk", M, q), None
    q, k = q.astype(g.dtype), k.astype(g.dtype)
    if g.ndim < q.ndim:
        factors = decay(g)
        entry, exit = _scaled(d.q, factors.entry), _scaled(d.k, factors.exit)
        M = d.pairs * factors.within
        d_log = Decay(
            within=d.pairs * pairs,
            entry=jnp.sum(entry * q, -1),
            exit=jnp.sum(exit * k, -1),
            total=factors.total * jnp.sum(d.total, -1),
        )
        d_q = entry + product("...ij,...jk->...ik", M, k)
        d_k = exit + product("...ij,...ik->...jk", M, q)
        return d_q, d_k, gradient(g, d_log)
    return _channel_gradients(product, q, k, g, d)


def _levels(g):
    """Factors of the decay within blocks of 1, 2, .. C tokens, by doubling.

    Returns:
        For each size below C, the factors from the start of a right half to after each
        of its tokens, and from after each token of a left half to its end, both
        [*batch, C / (2 size), size, K]. Then both for the whole chunk, [*batch, C, K].
    """
    start = jnp.exp(g)[..., :, None, :]
    end = jnp.ones_like(start)
    levels = []
    while start.shape[-2] < g.shape[-2]:
        (start_l, start_r), (end_l, end_r) = _halves(start), _halves(end)
        levels.append((start_r, end_l))
        start = jnp.concatenate([start_l, start_l[..., -1:, :] * start_r], axis=-2)
        end = jnp.concatenate([end_l * start_r[..., -1:, :], end_r], axis=-2)
    return levels, (start[..., 0, :, :], end[..., 0, :, :])


def _pairs(product, q, k, levels):
    """P, from the diagonal outwards."""
    blocks = jnp.sum(q * k, axis=-1)[..., :, None, None]
    for start, end in levels:
        size = start.shape[-2]
        q_right, k_left = _halves(_blocks(q, size))[1], _halves(_blocks(k, size))[0]
        across = product("...ik,...jk->...ij", q_right * start, k_left * end)
        left, right = _halves(blocks)
        upper = jnp.concatenate([left, jnp.zeros_like(left)], axis=-1)
        lower = jnp.concatenate([across, right], axis=-1)
        blocks = jnp.concatenate([upper, lower], axis=-2)
    return blocks[..., 0, :, :]


def _channel_gradients(product, q, k, g, d):
    """Go back through the levels, from the chunk to its tokens.

    The gradient for the logarithm of a factor is a query times the query's gradient, or
    a key times the key's; `d_start`, `d_end` and `d_total` hold it for the factors of
    the current blocks: from their start to a token, from a token to their end, and
    across them.
    """
    levels, (start, end) = _levels(g)
    d_q, d_k = d.q * start, d.k * end
    d_start, d_end = (_blocks(x, g.shape[-2]) for x in (d_q * q, d_k * k))
    d_total = (start[..., -1, :] * d.total)[..., None, None, :]
    d_pairs = d.pairs[..., None, :, :]
    for start, end in reversed(levels):
        size = start.shape[-2]
        q_right, k_left = _halves(_blocks(q, size))[1], _halves(_blocks(k, size))[0]
        across = d_pairs[..., size:, :size]
        more_q = start * product("...ij,...jk->...ik", across, k_left * end)
        more_k = end * product("...ij,...ik->...jk", across, q_right * start)
        d_q += _joined(jnp.zeros_like(more_q), more_q)
        d_k += _joined(more_k, jnp.zeros_like(more_k))
        d_total = _interleaved(
            d_total + jnp.sum(d_start[..., size:, :], -2, keepdims=True),
            d_total + jnp.sum(d_end[..., :size, :], -2, keepdims=True),
        )
        d_start = _interleaved(
            d_start[..., :size, :], d_start[..., size:, :] + more_q * q_right
        )
        d_end = _interleaved(
            d_end[..., :size, :] + more_k * k_left, d_end[..., size:, :]
        )
        d_pairs = _interleaved(d_pairs[..., :size, :size], d_pairs[..., size:, size:])
    diagonal = d_pairs[..., 0]
    d_g = (d_start + d_total)[..., 0, :]
    return d_q + diagonal * k, d_k + diagonal * q, d_g


def _scaled(x, factor):
    """diag(factor) x."""
    return factor[..., None] * x


def _blocks(x, size):
    """[..., C, K] to [..., C / size, size, K]."""
    return x.reshape(*x.shape[:-2], -1, size, x.shape[-1])


def _halves(x):
    """Left and right blocks of a row of blocks [..., m, size, K]."""
    return x[..., 0::2, :, :], x[..., 1::2, :, :]


def _joined(left, right):
    """Left and right blocks back to [..., C, K]."""
    x = jnp.concatenate([left, right], axis=-2)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _interleaved(left, right):
    """Left and right blocks [..., m, size, K] as a row of 2 m blocks."""
    x = jnp.stack([left, right], axis=-3)
    return x.reshape(*left.shape[:-3], -1, *left.shape[-2:])
