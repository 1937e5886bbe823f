"""The delta rule as one TPU kernel: the state stays in VMEM from chunk to chunk.

Per head and chunk of 128 keys, with Gamma, gamma and epsilon as in `chunked`:

    L = strict_tril(K K^T * Gamma) diag(beta),  P = tril(Q K^T * Gamma) diag(beta)
    (I + L) E = V - diag(gamma) K S                  the errors corrected by the steps
    O  = [P  diag(gamma) Q] [E; S]
    S' = gamma_C S + (K^T diag(beta epsilon)) E

The step sizes are factors of the columns here, so that they multiply rows of lanes,
which is free; multiplying rows of sublanes takes an expensive broadcast over lanes.

The system is solved by blocks of 32: the diagonal blocks are all inverted at once, with
4 heads side by side in the lanes (`_inverses`), and then the errors of one block after
another are computed and subtracted from the blocks below. The latency of that chain is
hidden by the other heads of the grid step, which are independent.

With bfloat16 operands a product takes one pass of the matrix unit. The products that
solve the system use x = hi + lo, two bfloat16 parts per factor, with all four products
in one pass (`left_in_parts`), which beta up to 2 needs. With float32 operands all
products are exact.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.delta_rule.tpu.sizes import (
    BLOCK,
    KEYS,
    PACK,
    Sizes,
    pack_row,
)
from pallas_kernels.products import EXACT
from pallas_kernels.tpu.chunk_grid import ChunkGrid
from pallas_kernels.tpu.gates import Gates
from pallas_kernels.tpu.limits import GROUP, groups
from pallas_kernels.tpu.tiles import (
    dot,
    fit,
    gather,
    indicator,
    iota,
    left_in_parts,
    right_in_parts,
    store_rows,
    to_rows,
    with_rest,
)


class Saved(NamedTuple):
    """Results of the forward kernel for the backward one; X is in packs of heads."""

    S: Float[Array, "B M H K V"]  # before each chunk
    E: Float[Array, "B M NC HV"]
    X: Float[Array, "B M packs*KEYS KEYS"]


def forward(
    q: Float[Array, "B M C HK"],
    k: Float[Array, "B M NC HK"],
    v: Float[Array, "B M NC HV"],
    gates: Float[Array, "B M G H KEYS"],
    states: Float[Array, "S H K V"],
    sequence: Int[Array, " M"] | None,
    exact: bool,
    save: bool,
) -> tuple[Array, Array, Saved | None]:
    """Outputs and final states, over a grid of rows, groups of heads and chunks.

    Args:
        gates: beta and, with a decay, its running sums hi and lo.
        sequence: index of each chunk's state; None for one state per row.
        exact: whether products are float32.
        save: whether to return what the gradient needs too.
    """
    (B, M, C, _), (_, H, K, V) = q.shape, states.shape
    NC = k.shape[2]
    name, gated = "delta_rule_forward", gates.shape[2] > 1
    sizes = Sizes.choose(name, H, NC // C, K, V, gated, exact)
    grid = ChunkGrid(B, H, M, sizes.heads, sequence)
    packed = sizes.packs * KEYS, KEYS
    results = [
        (jax.ShapeDtypeStruct((B, M, C, H * V), q.dtype), grid.tokens(C, V)),
        (jax.ShapeDtypeStruct(states.shape, jnp.float32), grid.states(K, V)),
    ]
    if save:
        S = jax.ShapeDtypeStruct((B, M, H, K, V), sizes.operand)
        E = jax.ShapeDtypeStruct((B, M, NC, H * V), sizes.operand)
        packs = H // sizes.heads * packed[0]
        X = jax.ShapeDtypeStruct((B, M, packs, KEYS), jnp.float32)
        results += [
            (S, grid.chunk_states(K, V)),
            (E, grid.tokens(NC, V)),
            (X, grid.stacked(*packed)),
        ]
    o, final, *saved = grid.call(
        partial(_kernel, sizes=sizes, save=save),
        name,
        operands=[
            (q, grid.tokens(C, K)),
            (k, grid.tokens(NC, K)),
            (v, grid.tokens(NC, V)),
            (gates, grid.rows(gates.shape[2], KEYS)),
            (states, grid.states(K, V)),
        ],
        results=results,
        scratch=[pltpu.VMEM(packed, jnp.float32)] * (1 if save else 2),
        vmem=sizes.vmem,
        flops=2 * (NC + C) * NC * (K + V) + 2 * (2 * NC + C) * K * V,
    )
    return o, final, Saved(*saved) if save else None


def _kernel(begins, *refs, sizes, save):
    saved = []
    if save:
        *refs, S_before_ref, E_ref, X_ref, L_ref = refs
        saved = [E_ref]
    else:
        *refs, L_ref, X_ref = refs
    q_ref, k_ref, v_ref, gates_ref, start_ref, o_ref, S_ref = refs

    @pl.when(begins)
    def _():
        S_ref[...] = start_ref[...]

    if save:
        S_before_ref[...] = S_ref[...].astype(S_before_ref.dtype)
    gates = [Gates.read(gates_ref, group) for group in groups(sizes.heads)]
    heads = [
        _Head(q_ref, k_ref, v_ref, S_ref, h, gates[h // GROUP], sizes)
        for h in range(sizes.heads)
    ]
    _inverses(heads, L_ref, X_ref)
    blocks = KEYS // BLOCK
    for i in range(blocks):
        for head in heads:
            head.solve_block(i, X_ref, *saved)
        if i + 1 < blocks:
            for head in heads:
                head.subtract_below(i)
    for head in heads:
        head.write(o_ref)


class _Head:
    """A head's chunk, from its operands to its results, in stages."""

    def __init__(self, q_ref, k_ref, v_ref, S_ref, h, gates, sizes):
        key_lanes = slice(h * sizes.K, (h + 1) * sizes.K)
        self.value_lanes = slice(h * sizes.V, (h + 1) * sizes.V)
        self.q_ref, self.k_ref = q_ref.at[:, key_lanes], k_ref.at[:, key_lanes]
        self.v_ref = v_ref.at[:, self.value_lanes]
        self.S_ref = S_ref.at[h]
        self.h, self.gates, self.sizes = h, gates, sizes
        self.j, self.row = h % GROUP, slice(h % GROUP, h % GROUP + 1)
        self.dot = partial(dot, precision=EXACT if sizes.exact else None)
        self.E = []
        self.find_system()

    def find_system(self):
        """Compute L, which the inverses need."""
        k, gates = self.k(), self.gates
        KK = self.dot(k, k, transposed=True)
        row, column = iota(KK.shape, 0), iota(KK.shape, 1)
        within = exit = gates.beta[self.row]
        if self.sizes.gated:
            hi, lo = gates.hi[self.row], gates.lo[self.row]
            self.entry, log = gates.entry_and_log(self.j, gates.columns, hi, lo)
            within = jnp.exp(jnp.where(row >= column, log, -jnp.inf)) * within
            exit = gates.exit[self.row] * exit
        self.within = within
        self.L = jnp.where(row > column, KK * within, 0.0)
        self.k_exit = (k.astype(jnp.float32).T * exit).astype(self.sizes.operand)

    def find_sides(self):
        """Compute R, the right-hand side, and the factors of the outputs."""
        sizes, gates, within = self.sizes, self.gates, self.within
        q, k = self.q_ref[...].astype(sizes.operand), self.k()
        self.S = self.S_ref[...].astype(sizes.operand)
        KS = self.dot(*with_rest(k, self.S_ref[...], sizes.exact))
        QK = self.dot(q, k, transposed=True)
        token, key = iota(QK.shape, 0), iota(QK.shape, 1)
        visible = token >= key // sizes.steps
        q_entry = q
        if not sizes.gated:
            within = jnp.where(visible, within, 0.0)
        else:
            entry = self.entry
            KS = fit(entry, sizes.V) * KS
            if sizes.steps > 1:
                first_key = indicator(key == sizes.steps * token)
                columns = dot(first_key, gates.columns)
                hi, lo = gates.hi[self.row], gates.lo[self.row]
                entry, log = gates.entry_and_log(self.j, columns, hi, lo)
                within = (
                    jnp.exp(jnp.where(visible, log, -jnp.inf)) * gates.beta[self.row]
                )
            q_entry = fit(entry, sizes.K) * q.astype(jnp.float32)
        self.R = to_rows(self.v_ref[...], KEYS).astype(jnp.float32) - KS
        self.P = (QK * within).astype(sizes.operand)
        self.q_entry = q_entry.astype(sizes.operand)

    def k(self):
        return to_rows(self.k_ref[...], KEYS).astype(self.sizes.operand)

    def solve_block(self, i, X_ref, E_ref=None):
        X = X_ref[pl.ds(pack_row(self.h) + i * BLOCK, BLOCK), :]
        X = left_in_parts(X, self.h % PACK * BLOCK, BLOCK, self.sizes.exact)
        self.e = self.dot(X, right_in_parts(self.R[:BLOCK], self.sizes.exact))
        self.E.append(self.e)
        if E_ref is not None:
            store_rows(E_ref, i * BLOCK, self.value_lanes, self.e)

    def subtract_below(self, i):
        exact = self.sizes.exact
        L = left_in_parts(self.L[(i + 1) * BLOCK :], i * BLOCK, BLOCK, exact)
        self.R = self.R[BLOCK:] - self.dot(L, right_in_parts(self.e, exact))

    def write(self, o_ref):
        E = jnp.concatenate(self.E, 0).astype(self.sizes.operand)
        o = self.dot(self.P, E) + self.dot(self.q_entry, self.S)
        o_ref[:, self.value_lanes] = o.astype(o_ref.dtype)
        S = self.S_ref[...]
        if self.gates.total is not None:
            S = self.gates.total[self.row] * S
        self.S_ref[...] = S + self.dot(self.k_exit, E)


def _inverses(heads, L_ref, X_ref):
    """Invert the diagonal blocks of I + L, row by row, by forward substitution.

    PACK heads are side by side in the lanes: row r of a pack is row r of each head's
    block. Every BLOCK-th row of two packs, which is row t of all their blocks, makes
    one register, and X_t = I_t - sum_s<t L_ts X_s is computed for all of them at once.
    This occupies the unit that moves lanes but not the matrix unit, which meanwhile
    computes the right-hand sides of the heads' systems.
    """
    rows = GROUP * KEYS // BLOCK // PACK
    lane = iota((BLOCK, KEYS), 1)
    packs = range(-(-len(heads) // GROUP))
    L, X = [], []
    for group in packs:
        for first in (group * GROUP, group * GROUP + PACK):
            for i in range(0, KEYS, BLOCK):
                block = jnp.zeros((BLOCK, KEYS), jnp.float32)
                for j, head in enumerate(heads[first : first + PACK]):
                    L_rows = head.L[i : i + BLOCK]
                    moved = pltpu.roll(L_rows, (j * BLOCK - i) % KEYS, axis=1)
                    block = jnp.where(lane // BLOCK == j, moved, block)
                L_ref[pl.ds(pack_row(first) + i, BLOCK), :] = block
        slices = [_every(group * GROUP, t, rows) for t in range(BLOCK)]
        L.append(jnp.concatenate([L_ref[row, :] for row in slices], 0))
        row = iota((BLOCK * rows, KEYS), 0) // rows
        X.append(indicator(row == iota(row.shape, 1) % BLOCK, jnp.float32))
    for s in range(BLOCK):
        for group in packs:
            X_s, X_below = X[group][:rows], X[group][rows:]
            X_ref[_every(group * GROUP, s, rows), :] = X_s
            below = BLOCK - s - 1
            if below:
                L_below = L[group][(s + 1) * rows :]
                column = iota(L_below.shape, 1) // BLOCK * BLOCK + s
                product = gather(L_below, column) * jnp.concatenate([X_s] * below, 0)
                X[group] = X_below - product
        for head in heads[s * len(heads) // BLOCK : (s + 1) * len(heads) // BLOCK]:
            head.find_sides()


def _every(head, t, rows):
    """The slice with row t of all blocks of the head's group."""
    return pl.ds(pack_row(head) + t, rows, stride=BLOCK)
