"""The selective scan as one TPU kernel: the state stays in VMEM from chunk to chunk.

    h <- exp(dt_t A) h + u_t B_t^T,   y_t = h C_t,   u = dt x

A state [N, E] has the channels in the lanes, in groups of 128. A vector over channels
is a row, and a vector over the N states is a column, one lane of the chunk's B^T or
C^T. There are no matrix products: every state has its own decay at every token.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.selective_scan.tpu.sizes import CHUNK, VMEM, sizes
from pallas_kernels.tpu.chunk_grid import ChunkGrid
from pallas_kernels.tpu.tiles import LANES, SUBLANES, RowSums

LN_2 = math.log(2)


def forward(
    x: Float[Array, "B M C E"],
    dt: Float[Array, "B M C E"],
    columns: Float[Array, "B M rows C"],
    A: Float[Array, "G N LANES"],
    states: Float[Array, "S G N LANES"],
    sequence: Int[Array, " M"] | None,
    resets: bool,
    save: bool,
) -> tuple[Array, Array, Array | None]:
    """Outputs in float32, final states and, with `save`, the state before each chunk.

    Args:
        columns: see `Columns`.
        A: divided by ln 2, so that the decay is 2^(dt A).
        sequence: index of each chunk's state; None for one state per row.
        resets: whether there are tokens before which the state is zeroed.
    """
    (rows, M, _, E), (G, N, _) = x.shape, A.shape
    name = "selective_scan_forward"
    groups, unroll = sizes(name, G)
    grid = ChunkGrid(rows, G, M, groups, sequence)
    channel_block, state_block = grid.tokens(CHUNK, LANES), grid.states(N, LANES)
    results = [
        (jax.ShapeDtypeStruct((rows, M, CHUNK, E), jnp.float32), channel_block),
        (jax.ShapeDtypeStruct(states.shape, jnp.float32), state_block),
    ]
    if save:
        before = jax.ShapeDtypeStruct((rows, M, G, N, LANES), jnp.float32)
        results.append((before, grid.chunk_states(N, LANES)))
    y, final, *before = grid.call(
        partial(_kernel, resets=resets, unroll=unroll),
        name,
        operands=[
            (x, channel_block),
            (dt, channel_block),
            (columns, grid.shared(columns.shape[2], CHUNK)),
            (A, grid.constant(N, LANES)),
            (states, state_block),
        ],
        results=results,
        scratch=[row_scratch(2, groups)],
        vmem=VMEM,
        flops=6 * CHUNK * N * LANES,
        exponentials=CHUNK * N * LANES,
    )
    return y, final, before[0] if save else None


class Columns(NamedTuple):
    """The vectors over the N states, and the resets, for the tokens of one register.

    The array has the rows of B^T and C^T and, with resets, SUBLANES rows that are 0 for
    tokens before which the state is zeroed and 1 for others.
    """

    columns: Float[Array, "rows C"]
    N: int
    resets: bool

    @classmethod
    def read(cls, ref, block, N: int, resets: bool):
        """Read a block of SUBLANES tokens, shifted to the first lanes."""
        shift = lax.rem(CHUNK - block * SUBLANES, CHUNK)
        return cls(pltpu.roll(ref[...], shift, 1), N, resets)

    def B(self, t: int):
        return self.columns[: self.N, t : t + 1]

    def C(self, t: int):
        return self.columns[self.N : 2 * self.N, t : t + 1]

    def decay(self, t: int, dt, A):
        """The token's decays; zero where the state is reset."""
        factor = jnp.exp2(dt * A)
        if not self.resets:
            return factor
        return self.columns[2 * self.N : 2 * self.N + 1, t : t + 1] * factor


DT, U, DY = range(3)
"""Indices of the kinds of rows in the scratch of `row_scratch`."""


def row_scratch(kinds, groups):
    """Scratch for the rows of a block; loading a row from it fills all sublanes."""
    return pltpu.VMEM((kinds, SUBLANES, groups * LANES), jnp.float32)


def rows_of(block):
    """The rows of a block of SUBLANES tokens."""
    return pl.ds(pl.multiple_of(block * SUBLANES, SUBLANES), SUBLANES)


def lanes_of(group):
    """The lanes of a group's channels."""
    return slice(group * LANES, (group + 1) * LANES)


def _kernel(
    begins, x_ref, dt_ref, columns_ref, A_ref, start_ref, *refs, resets, unroll
):
    y_ref, h_ref, *before_ref, rows_ref = refs
    groups, N, _ = A_ref.shape

    @pl.when(begins)
    def _():
        h_ref[...] = start_ref[...]

    for ref in before_ref:
        ref[...] = h_ref[...]

    def tokens(block, states):
        columns = Columns.read(columns_ref, block, N, resets)
        x, dt = x_ref[rows_of(block), :].astype(jnp.float32), dt_ref[rows_of(block), :]
        rows_ref[DT], rows_ref[U] = dt, dt * x
        states, y = list(states), [RowSums() for _ in states]
        for t in range(SUBLANES):
            for i, h in enumerate(states):
                at = slice(t, t + 1), lanes_of(i)
                h = columns.decay(t, rows_ref[DT, *at], A_ref[i]) * h
                states[i] = h + rows_ref[U, *at] * columns.B(t)
                y[i].add(t, states[i] * columns.C(t))
        for i, rows in enumerate(y):
            y_ref[rows_of(block), lanes_of(i)] = rows.sums
        return states

    states = [h_ref[group] for group in range(groups)]
    states = lax.fori_loop(0, CHUNK // SUBLANES, tokens, states, unroll=unroll)
    for group, h in enumerate(states):
        h_ref[group] = h
