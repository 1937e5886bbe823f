"""Matrix products with more than the precision of their type.

Reflections (beta = 2 along a unit key) neither shrink nor forget. The rounding error of
k.k is the same at every step that uses k, so its effect grows with the number of steps,
while the rounding errors of the recurrence, with random signs, grow only with its root.
Hence K K^T is computed as the unrounded sum of two parts, and W, which carries every
state across a chunk, is corrected by its residual.

To make a product exact, its factors are split into a rest and a multiple of a power of
two that is so coarse that sums of products of multiples fit the significand. The power
depends on at most one row, so that no token changes the rounding of an earlier one.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.products import EXACT


def gram(
    k: Float[Array, "*batch n K"],
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*batch n n"]]:
    """K K^T as its rounded value and the rest."""
    bits = _significand(k.dtype) // 2 - 1
    norm = jnp.sqrt(jnp.sum(k * k, axis=-1, keepdims=True))
    _, exponent = jnp.frexp(norm)  # norm < 2^exponent
    coarse, fine = split(k, jnp.ldexp(jnp.ones_like(norm), exponent - bits))
    exact = _gram(coarse, coarse)
    half = _gram(coarse + fine / 2, fine)
    return two_sum(exact, half + jnp.swapaxes(half, -1, -2))


def residual(
    L: Float[Array, "*batch n n"],
    L_rest: Float[Array, "*batch n n"],
    Y: Float[Array, "*batch n d"],
    X: Float[Array, "*batch n d"],
) -> Float[Array, "*batch n d"]:
    """Y - (I + L + L_rest) X, in which everything but rounding errors cancels.

    The powers of two suit unit keys, |L| <= 2 and |X| < 8 d^-1/2. Beyond these limits
    the coarse product is rounded as usual, and the residual has the usual accuracy.
    """
    n, d = X.shape[-2:]
    bits = (_significand(X.dtype) - (n - 1).bit_length()) // 2
    L_coarse, L_fine = split(L, 2.0 ** (1 - bits))
    X_coarse, X_fine = split(X, 2.0 ** (3 - (d.bit_length() - 1) // 2 - bits))
    exact = jnp.matmul(L_coarse, X_coarse, precision=EXACT)
    rest = jnp.matmul(L_coarse, X_fine, precision=EXACT)
    rest += jnp.matmul(L_fine + L_rest, X, precision=EXACT)
    rounded, rounding = two_sum(exact, X)
    return (Y - rounded) - (rounding + rest)


def split(x, step):
    """x as a multiple of `step`, a power of two, and the rest."""
    coarse = jnp.round(x / step) * step
    return coarse, x - coarse


def two_sum(a, b):
    """a + b as its rounded value and the rest (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _significand(dtype):
    return jnp.finfo(dtype).nmant + 1


def _gram(x, y):
    return jnp.einsum("...ik,...jk->...ij", x, y, precision=EXACT)
