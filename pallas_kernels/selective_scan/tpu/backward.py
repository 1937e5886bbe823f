"""The gradient of the selective scan as one TPU kernel, from the last chunk back.

The states of a chunk are recomputed from the one before it. Then, with dh_t the
gradient for h_t,

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
    row_scratch,
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
    """Gradients for x, dt, B and C together, A, and the initial states.

    Those for B and C are the first and the second row of [B, M, steps, SUBLANES, C N],
    to be summed over the steps of the grid; that for A, not divided by ln 2, is
    [B, M, G, N, LANES], to be summed over rows and chunks.
    """
    (rows, M, _, _), (G, N, _) = x.shape, A.shape
    name = "selective_scan_backward"
    groups, unroll = sizes(name, G)
    grid = ChunkGrid(rows, G, M, groups, sequence, backward=True)
    channel_block, state_block = grid.tokens(CHUNK, LANES), grid.states(N, LANES)
    chunk_block = grid.chunk_states(N, LANES)
    x_like = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    sums = jax.ShapeDtypeStruct(
        (rows, M, G // groups * SUBLANES, CHUNK * N), jnp.float32
    )
    terms = pltpu.VMEM((CHUNK * N, LANES), jnp.float32)
    d_x, d_dt, sums, d_A, d_states = grid.call(
        partial(_kernel, resets=resets, unroll=unroll),
        name,
        operands=[
            (x, channel_block),
            (dt, channel_block),
            (dy, channel_block),
            (columns, grid.shared(columns.shape[2], CHUNK)),
            (A, grid.constant(N, LANES)),
            (before, chunk_block),
            (d_states, state_block),
        ],
        results=[
            (x_like, channel_block),
            (x_like, channel_block),
            (sums, grid.stacked(SUBLANES, CHUNK * N)),
            (jax.ShapeDtypeStruct(before.shape, jnp.float32), chunk_block),
            (jax.ShapeDtypeStruct(d_states.shape, jnp.float32), state_block),
        ],
        scratch=[
            pltpu.VMEM((groups, CHUNK * N, LANES), jnp.float32),
            terms,
            terms,
            row_scratch(3, groups),
        ],
        vmem=VMEM,
        flops=20 * CHUNK * N * LANES,
        exponentials=2 * CHUNK * N * LANES,
    )
    sums = sums.reshape(rows, M, -1, SUBLANES, CHUNK * N)
    return d_x, d_dt, sums, d_A, d_states


def _kernel(ends, *refs, resets, unroll):
    x_ref, dt_ref, dy_ref, columns_ref, A_ref, before_ref, d_end_ref, *refs = refs
    (
        dx_ref,
        ddt_ref,
        sums_ref,
        dA_ref,
        dh_ref,
        h_ref,
        B_terms_ref,
        C_terms_ref,
        rows_ref,
    ) = refs
    (groups, N, _), blocks = A_ref.shape, CHUNK // SUBLANES

    @pl.when(ends)
    def _():
        dh_ref[...] = d_end_ref[...]

    def states_of(block, t):
        """The rows of a token in h_ref and in the terms."""
        return pl.ds(pl.multiple_of((block * SUBLANES + t) * N, SUBLANES), N)

    def read(block):
        """The block's columns, dt and x; also writes its rows to rows_ref."""
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
        carry = list(carry)
        du, d_log = [RowSums() for _ in carry], [RowSums() for _ in carry]
        for t in reversed(range(SUBLANES)):
            terms_B, terms_C = [], []
            for i, (h, dh, dA) in enumerate(carry):
                at = slice(t, t + 1), lanes_of(i)
                dt_row, dy = rows_ref[DT, *at], rows_ref[DY, *at]
                dh = dh + columns.C(t) * dy
                terms_B.append(dh * rows_ref[U, *at])
                terms_C.append(h * dy)
                du[i].add(t, dh * columns.B(t))
                h = h_ref[i, states_of(block, t), :]
                dh = columns.decay(t, dt_row, A_ref[i]) * dh
                dl = dh * h
                d_log[i].add(t, dl * A_ref[i])
                carry[i] = h, dh, dA + dl * dt_row
            at = states_of(block, t)
            B_terms_ref[at, :], C_terms_ref[at, :] = sum(terms_B), sum(terms_C)
        for i, (du_i, d_log_i) in enumerate(zip(du, d_log, strict=True)):
            rows, lanes = rows_of(block), lanes_of(i)
            dx_ref[rows, lanes] = (du_i.sums * dt[:, lanes]).astype(dx_ref.dtype)
            ddt_ref[rows, lanes] = du_i.sums * x[:, lanes] + LN_2 * d_log_i.sums
        return carry

    starts = [before_ref[group] for group in range(groups)]
    ends = lax.fori_loop(0, blocks, forward, starts, unroll=unroll)
    carry = [(h, dh_ref[i], jnp.zeros_like(h)) for i, h in enumerate(ends)]
    for i, (_, dh, dA) in enumerate(lax.fori_loop(0, blocks, backward, carry)):
        dh_ref[i], dA_ref[i] = dh, dA
    sums_ref[...] = jnp.zeros_like(sums_ref)
    for i, terms in enumerate((B_terms_ref, C_terms_ref)):
        sums_ref[i : i + 1, :] = lane_sums([terms[...]], exact=True)[:1]
