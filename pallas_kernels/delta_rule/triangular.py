"""Unit lower triangular systems (I + L) X = Y by block substitution.

Only the diagonal blocks are inverted, row by row, which is exact up to rounding for
every L. Products of powers of L or Newton's iteration need fewer steps, but overflow
for repeated keys and beta near 2, where the powers of L far exceed the inverse.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.products import EXACT


def invert_diagonal_blocks(
    L: Float[Array, "*batch n n"], block: int
) -> Float[Array, "*batch m b b"]:
    """Inverses of the diagonal blocks of I + L, by forward substitution.

    Args:
        L: strictly lower triangular.
        block: rows per block; divides n.
    """
    *batch, n, _ = L.shape
    L = L.reshape(*batch, n // block, block, n // block, block)
    L = jnp.moveaxis(jnp.diagonal(L, axis1=-4, axis2=-2), -1, -3)

    # Row i of the inverse less I, -L_i - sum_{j<i} L_ij X_j, replaces row i of -L.
    def substitute(i, X):
        row = jax.lax.dynamic_index_in_dim(X, i, axis=-2, keepdims=False)
        row += jnp.sum(row[..., :, None] * X, axis=-2)
        return jax.lax.dynamic_update_index_in_dim(X, row, i, axis=-2)

    X = jax.lax.fori_loop(1, block, substitute, -L)
    return X + jnp.eye(block, dtype=X.dtype)[(None,) * (X.ndim - 2)]


def solve(
    L: Float[Array, "*batch n n"],
    inverses: Float[Array, "*batch m b b"],
    Y: Float[Array, "*batch n d"],
) -> Float[Array, "*batch n d"]:
    """X with (I + L) X = Y, one block of rows after another."""
    block = inverses.shape[-1]
    X = []
    for i in range(inverses.shape[-3]):
        rows = slice(i * block, (i + 1) * block)
        known = Y[..., rows, :]
        if i:
            above = jnp.concatenate(X, axis=-2)
            known = known - jnp.matmul(
                L[..., rows, : i * block], above, precision=EXACT
            )
        X.append(jnp.matmul(inverses[..., i, :, :], known, precision=EXACT))
    return jnp.concatenate(X, axis=-2)


def solve_transposed(
    L: Float[Array, "*batch n n"],
    inverses: Float[Array, "*batch m b b"],
    Y: Float[Array, "*batch n d"],
) -> Float[Array, "*batch n d"]:
    """X with (I + L)^T X = Y, from the last block of rows to the first."""
    block = inverses.shape[-1]
    X = []
    for i in reversed(range(inverses.shape[-3])):
        rows = slice(i * block, (i + 1) * block)
        known = Y[..., rows, :]
        if X:
            below = jnp.concatenate(X, axis=-2)
            L_below = jnp.swapaxes(L[..., (i + 1) * block :, rows], -1, -2)
            known = known - jnp.matmul(L_below, below, precision=EXACT)
        inverse = jnp.swapaxes(inverses[..., i, :, :], -1, -2)
        X.insert(0, jnp.matmul(inverse, known, precision=EXACT))
    return jnp.concatenate(X, axis=-2)
