"""Decay between the tokens of a chunk, from per-token log decays g <= 0.

Every exponent is a sum of just the terms in its interval, all of one sign. The usual
difference of two cumulative sums, G_i - G_j, cancels: after one g = -1e4 its rounding
error is 1e-3, and after one g = -inf (a reset of the state) it is NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Decay(NamedTuple):
    """Factors by which a state shrinks along a chunk, or their logarithms.

    Attributes:
        within: from after token j to after token i, for j <= i.
        entry: from the state before the chunk to after token i.
        exit: from after token j to the end of the chunk.
        total: across the whole chunk.
    """

    within: Float[Array, "*batch C C"]
    entry: Float[Array, "*batch C"]
    exit: Float[Array, "*batch C"]
    total: Float[Array, "*batch"]


def log_decay(g: Float[Array, "*batch C"]) -> Decay:
    """Sums of g over intervals; C is a power of two. Linear in g.

    Within: D_ij = sum_{j < m <= i} g_m, by doubling. An interval that crosses the
    middle of a block is an end of the left half and a beginning of the right half.
    """
    size = 1
    D = jnp.zeros((*g.shape, 1, 1), g.dtype)
    while size < g.shape[-1]:
        left, right = D[..., 0::2, :, :], D[..., 1::2, :, :]
        beginning = g[..., size :: 2 * size, None] + right[..., :, 0]
        end = left[..., -1, :]
        across = beginning[..., :, None] + end[..., None, :]
        upper = jnp.concatenate([left, jnp.zeros_like(left)], axis=-1)
        lower = jnp.concatenate([across, right], axis=-1)
        D = jnp.concatenate([upper, lower], axis=-2)
        size *= 2
    within = D[..., 0, :, :]
    entry = g[..., :1] + within[..., :, 0]
    return Decay(within, entry, within[..., -1, :], entry[..., -1])


def decay(g: Float[Array, "*batch C"]) -> Decay:
    """The factors; `within` is zero above the diagonal, masked before `exp`."""
    log = log_decay(g)
    causal = jnp.tril(jnp.ones(log.within.shape[-2:], bool))
    within = jnp.where(causal, log.within, -jnp.inf)
    return jax.tree.map(jnp.exp, log._replace(within=within))


def gradient(g: Float[Array, "*batch C"], d_log: Decay) -> Float[Array, "*batch C"]:
    """Gradient for g from those for the logarithms.

    The gradient of each interval is added to the tokens in it.
    """
    (d_g,) = jax.linear_transpose(log_decay, g)(d_log)
    return d_g
