"""The gradient of the selective scan as one TPU kernel, from the last chunk on.

A chunk's states are computed anew from the one before it. Then, with dh_t the gradient
for h_t,

    dh_t = C_t dy_t + exp(dt_{t+1} A) dh_{t+1}
    du_t = sum over N of dh_t B_t,    dB_t = sum over E of dh_t u_t
    dC_t = sum over E of h_t dy_t,    dl_t = dh_t exp(dt_t A) h_{t-1} for l_t = dt_t A
    dA = sum over t of dl_t dt_t,     d dt_t = sum over N of dl_t A + du_t x_t
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.selective_scan.tpu.forward import (
    DT,
    DY,
    LN_2,
    Columns,
    U,
    lanes_of,
    of_block,
    rows_of,
)
from pallas_kernels.selective_scan.tpu.sizes import CHUNK, VMEM, sizes
from pallas_kernels.tpu.chunk_grid import ChunkGrid
from pallas_kernels.tpu.tiles import LANES, SUBLANES, RowSums, lane_sums


def backward(
    x: Float[Array, "B M C E"],
    dt: Float[Array, "B M C E"],
    dy: Float[Array, "B M C E"],
    columns: Float[Array, "B M rows C"],
    A: Float[Array, "G N LANES"],
    before: Float[Array, "B M G N LANES"],
    d_states: Float[Array, "S G N LANES"],
    sequence: Int[Array, " M"] | None,
    resets: bool,
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients of x, dt, of B and C, of A and of the initial states.

    Those of B and C come as [B, M, steps, SUBLANES, C N], in the first and the second
    row, to be summed over the steps of the grid; that of A, not over ln 2, as
    [B, M, G, N, LANES], to be summed over rows and chunks.
    """
    (rows, M, _, _), (G, N, _) = x.shape, A.shape
    name = "selective_scan_backward"
    groups, unroll = sizes(name, G)
    grid = ChunkGrid(rows, G, M, groups, sequence, backward=True)
    of_channels, of_states = grid.tokens(CHUNK, LANES), grid.states(N, LANES)
    of_chunks = grid.chunk_states(N, LANES)
    of_x = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    sums = jax.ShapeDtypeStruct(
        (rows, M, G // groups * SUBLANES, CHUNK * N), jnp.float32
    )
    terms = pltpu.VMEM((CHUNK * N, LANES), jnp.float32)
    d_x, d_dt, sums, d_A, d_states = grid.call(
        partial(_kernel, resets=resets, unroll=unroll),
        name,
        operands=[
            *((x, of_channels), (dt, of_channels), (dy, of_channels)),
            (columns, grid.shared(columns.shape[2], CHUNK)),
            *((A, grid.constant(N, LANES)), (before, of_chunks)),
            (d_states, of_states),
        ],
        results=[
            *((of_x, of_channels), (of_x, of_channels)),
            (sums, grid.stacked(SUBLANES, CHUNK * N)),
            (jax.ShapeDtypeStruct(before.shape, jnp.float32), of_chunks),
            (jax.ShapeDtypeStruct(d_states.shape, jnp.float32), of_states),
        ],
        scratch=[
            *(pltpu.VMEM((groups, CHUNK * N, LANES), jnp.float32), terms, terms),
            of_block(3, groups),
        ],
        vmem=VMEM,
        flops=20 * CHUNK * N * LANES,
        exponentials=2 * CHUNK * N * LANES,
    )
    sums = sums.reshape(rows, M, -1, SUBLANES, CHUNK * N)
    return d_x, d_dt, sums, d_A, d_states


def _kernel(ends, *refs, resets, unroll):
    x_ref, dt_ref, dy_ref, columns_ref, A_ref, before_ref, d_end_ref, *refs = refs
    dx_ref, ddt_ref, sums_ref, dA_ref, dh_ref, h_ref, of_B_ref, of_C_ref, rows_ref = (
        refs
    )
    (groups, N, _), blocks = A_ref.shape, CHUNK // SUBLANES

    @pl.when(ends)
    def _():
        dh_ref[...] = d_end_ref[...]

    def states_of(block, t):
        """Rows of h_ref, or of the terms, of a token."""
        return pl.ds(pl.multiple_of((block * SUBLANES + t) * N, SUBLANES), N)

    def read(block):
        """The block's columns, dt and x, and its rows into rows_ref."""
        dt, x = dt_ref[rows_of(block), :], x_ref[rows_of(block), :].astype(jnp.float32)
        rows_ref[DT], rows_ref[U] = dt, dt * x
        return Columns.read(columns_ref, block, N, resets), dt, x

    def forward(block, states):
        columns, _, _ = read(block)
        states = list(states)
        for t in range(SUBLANES):
            for i, h in enumerate(states):
                at = slice(t, t + 1), lanes_of(i)
                # The state before the token, for its gradient.
                h_ref[i, states_of(block, t), :] = h
                h = columns.decay(t, rows_ref[DT, *at], A_ref[i]) * h
                states[i] = h + rows_ref[U, *at] * columns.B(t)
        return states

    def backward(step, carry):
        block = blocks - 1 - step
        columns, dt, x = read(block)
        rows_ref[DY] = dy_ref[rows_of(block), :].astype(jnp.float32)
        carry, du, d_log = list(carry), *([RowSums() for _ in carry] for _ in range(2))
        for t in reversed(range(SUBLANES)):
            of_B, of_C = [], []
            for i, (h, dh, dA) in enumerate(carry):
                at = slice(t, t + 1), lanes_of(i)
                dt_row, dy = rows_ref[DT, *at], rows_ref[DY, *at]
                dh = dh + columns.C(t) * dy
                of_B.append(dh * rows_ref[U, *at])
                of_C.append(h * dy)
                du[i].add(t, dh * columns.B(t))
                h = h_ref[i, states_of(block, t), :]
                dh = columns.decay(t, dt_row, A_ref[i]) * dh
                dl = dh * h
                d_log[i].add(t, dl * A_ref[i])
                carry[i] = h, dh, dA + dl * dt_row
            at = states_of(block, t)
            of_B_ref[at, :], of_C_ref[at, :] = sum(of_B), sum(of_C)
        for i, (of_u, of_log) in enumerate(zip(du, d_log, strict=True)):
            rows, lanes = rows_of(block), lanes_of(i)
            dx_ref[rows, lanes] = (of_u.sums * dt[:, lanes]).astype(dx_ref.dtype)
            ddt_ref[rows, lanes] = of_u.sums * x[:, lanes] + LN_2 * of_log.sums
        return carry

    starts = [before_ref[group] for group in range(groups)]
    ends = lax.fori_loop(0, blocks, forward, starts, unroll=unroll)
    carry = [(h, dh_ref[i], jnp.zeros_like(h)) for i, h in enumerate(ends)]
    for i, (_, dh, dA) in enumerate(lax.fori_loop(0, blocks, backward, carry)):
        dh_ref[i], dA_ref[i] = dh, dA
    sums_ref[...] = jnp.zeros_like(sums_ref)
    for i, terms in enumerate((of_B_ref, of_C_ref)):
        sums_ref[i : i + 1, :] = lane_sums([terms[...]], exact=True)[:1]
