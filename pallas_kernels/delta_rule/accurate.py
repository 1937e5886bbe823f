"""Matrix products to more than the accuracy of their type.

Reflections (beta = 2 along a unit key) neither shrink nor forget: an error of 1e-8 in a
key's squared norm, which is the rounding of float32, is made again at every step that
uses the key and grows with the number of steps, while the roundings of the recurrence
are of random sign and grow with its root. So K K^T is computed as an unrounded sum of
two parts, and W, which carries every state across a chunk, is corrected by its residual.

Products are made exact by splitting a factor into a multiple of a coarse power of two
and a rest: sums of products of the multiples fit the significand.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EXACT = jax.lax.Precision.HIGHEST


def gram(
    k: Float[Array, "*batch n K"],
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*batch n n"]]:
    """K K^T as its rounding and the rest, together of twice the usual accuracy."""
    norm = jnp.sqrt(jnp.sum(k * k, axis=-1, keepdims=True))
    bits = (jnp.finfo(k.dtype).nmant + 1) // 2 - 1
    coarse, fine = split(k, norm, bits)
    exact = _pairs(coarse, coarse)
    half = _pairs(coarse + fine / 2, fine)
    return two_sum(exact, half + jnp.swapaxes(half, -1, -2))


def residual(
    L: Float[Array, "*batch n n"],
    L_rest: Float[Array, "*batch n n"],
    Y: Float[Array, "*batch n d"],
    X: Float[Array, "*batch n d"],
) -> Float[Array, "*batch n d"]:
    """Y - (I + L + L_rest) X, correct although it is all but cancelled."""
    n = L.shape[-1]
    bits = (jnp.finfo(L.dtype).nmant + 1 - (n - 1).bit_length()) // 2
    L_size = jnp.max(jnp.abs(L), axis=(-2, -1), keepdims=True)
    X_size = jnp.max(jnp.abs(X), axis=(-2, -1), keepdims=True)
    L_coarse, L_fine = split(L, L_size, bits)
    X_coarse, X_fine = split(X, X_size, bits)
    exact = jnp.matmul(L_coarse, X_coarse, precision=EXACT)
    rest = jnp.matmul(L_coarse, X_fine, precision=EXACT)
    rest += jnp.matmul(L_fine + L_rest, X, precision=EXACT)
    high, low = two_sum(exact, X)
    return (Y - high) - (low + rest)


def split(x, size, bits):
    """x as a multiple of 2^-bits size and a rest; size >= |x| is made a power of two."""
    _, exponent = jnp.frexp(size)
    step = jnp.ldexp(jnp.ones((), x.dtype), exponent - bits)
    coarse = jnp.round(x / step) * step
    return coarse, x - coarse


def two_sum(a, b):
    """The rounded sum and its rounding error."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def _pairs(x, y):
    return jnp.einsum("...ik,...jk->...ij", x, y, precision=EXACT)
