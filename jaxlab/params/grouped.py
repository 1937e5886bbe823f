"""Products of groups of rows, each group with its own matrix.

`jax.lax.ragged_dot` is the right program for TPUs and GPUs. For a CPU, XLA turns it
into M masked products of all rows; there, a loop over blocks of rows costs what one
matrix would.
"""

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap  # ragged_dot has no batching rule
from jaxtyping import Array, Float, Int

ROWS = 256  # in a block: enough for a fast product, few compared with a group


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "N in"], w: Float[Array, "M in out"], sizes: Int[Array, " M"]
) -> Float[Array, "N out"]:
    """``y_n = x_n w_m`` for the rows n of group m; 0 past the last group.

    Args:
        x: rows, sorted by group.
        w: one matrix per group, in the dtype of `x`.
        sizes: number of rows in each group, summing to at most N.
    """
    return _multiply(x, w, sizes)


def group_of_rows(sizes: Int[Array, " M"], rows: int) -> Int[Array, " N"]:
    """The group of each of `rows` rows, M past the last group."""
    index = jnp.arange(rows, dtype=sizes.dtype)
    return jnp.searchsorted(jnp.cumsum(sizes), index, side="right").astype(sizes.dtype)


@sequential_vmap
def _multiply(x, w, sizes):
    return jax.lax.platform_dependent(
        x, w, sizes, cpu=_multiply_blocks, default=jax.lax.ragged_dot
    )


@sequential_vmap
def _outer(x, dy, sizes):
    """``sum of x_n dy_n^T`` over the rows n of each group."""
    return jax.lax.platform_dependent(
        x, dy, sizes, cpu=_outer_blocks, default=_outer_ragged
    )


def _forward(x, w, sizes):
    return _multiply(x, w, sizes), (x, w, sizes)


def _backward(residuals, dy):
    x, w, sizes = residuals
    return _multiply(dy, w.mT, sizes), _outer(x, dy, sizes), None


grouped_matmul.defvjp(_forward, _backward)


def _outer_ragged(x, dy, sizes):
    w = jax.ShapeDtypeStruct((*sizes.shape, x.shape[1], dy.shape[1]), x.dtype)

    def multiply(w):
        return jax.lax.ragged_dot(x, w, sizes)

    return jax.linear_transpose(multiply, w)(dy)[0]


def _blocks(sizes, N: int, R: int):
    """Group, first row and number of rows of each block; no block crosses groups.

    The rows past the last group form group M, which has no matrix: its blocks have 0
    rows.
    """
    M = sizes.shape[0]
    sizes = jnp.append(sizes, N - jnp.sum(sizes))
    ends, blocks = jnp.cumsum(sizes), (sizes + R - 1) // R
    last_block = jnp.cumsum(blocks)
    i = jnp.arange(N // R + M + 1, dtype=sizes.dtype)
    m = jnp.minimum(jnp.searchsorted(last_block, i, side="right"), M)
    start = (ends - sizes)[m] + (i - (last_block - blocks)[m]) * R
    start = jnp.minimum(start, N)
    rows = jnp.where(m < M, jnp.minimum(ends[m] - start, R), 0)
    return m, start, rows


def _pad(x):
    """Append rows for the last block to reach into; also returns the block size."""
    R = min(ROWS, x.shape[0])
    return jnp.pad(x, ((0, R), (0, 0))), R


def _multiply_blocks(x, w, sizes):
    """Each block also writes rows past its group, which the next block overwrites."""
    N = x.shape[0]
    x, R = _pad(x)

    def block(y, operands):
        m, start, rows = operands
        matrix = jax.lax.dynamic_index_in_dim(w, m, keepdims=False)
        product = jax.lax.dynamic_slice_in_dim(x, start, R) @ matrix
        product = jnp.where(rows > 0, product, jnp.zeros((), x.dtype))
        return jax.lax.dynamic_update_slice_in_dim(y, product, start, 0), None

    y = jnp.zeros((N + R, w.shape[-1]), x.dtype)
    return jax.lax.scan(block, y, _blocks(sizes, N, R))[0][:N]


def _outer_blocks(x, dy, sizes):
    N, dtype = x.shape[0], x.dtype
    (x, R), (dy, _) = _pad(x), _pad(dy)

    def block(dw, operands):
        m, start, rows = operands
        in_group = (jnp.arange(R) < rows)[:, None]
        x_block = jax.lax.dynamic_slice_in_dim(x, start, R)
        x_block = jnp.where(in_group, x_block, jnp.zeros((), dtype))
        dy_block = jax.lax.dynamic_slice_in_dim(dy, start, R)
        part = jnp.matmul(x_block.mT, dy_block, preferred_element_type=dw.dtype)
        sum_m = jax.lax.dynamic_index_in_dim(dw, m, keepdims=False) + part
        return jax.lax.dynamic_update_index_in_dim(dw, sum_m, m, 0), None

    shape = (*sizes.shape, x.shape[1], dy.shape[1])
    dw = jnp.zeros(shape, jnp.float64 if dtype == jnp.float64 else jnp.float32)
    return jax.lax.scan(block, dw, _blocks(sizes, N, R))[0].astype(dtype)
