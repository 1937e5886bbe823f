"""The delta rule's gradient as one TPU kernel: the state's gradient stays in VMEM.

Chunks run from the last to the first. Per head, given dO, dS' and what `forward` saved
of a chunk (S before it, the errors E, the inverses of the diagonal blocks), and with
U = diag(beta) E, A = strict_tril(K K^T * Gamma) and P = tril(Q K^T * Gamma):

    (I + A^T diag(beta)) Y = P^T dO + diag(epsilon) K dS'
    dV = dR = diag(beta) Y
    dbeta = sum over channels of E * Y
    M_P = tril(dO U^T * Gamma),  M_A = -strict_tril(dR U^T * Gamma)
    dQ = diag(gamma) dO S^T + M_P K
    dK = M_P^T Q + (M_A + M_A^T) K - diag(gamma) dR S^T + diag(epsilon) U dS'^T
    dS = gamma_C dS' + Q^T diag(gamma) dO - K^T diag(gamma) dR

The system is that of the forward kernel, transposed: dR = X^T diag(beta) (...), block
by block from the last, with the saved X; Y is what remains of each block's right-hand
side.

A decay's gradient is the sum over all intervals that contain it: from token j to i,
(M_P * Q K^T + M_A * K K^T)_ij; from the chunk's start, the terms with gamma; to its
end, those with epsilon; and across it, gamma_C S * dS'. The shorter form, with
differences q dq - k dk, cancels where a decay is strong. The kernel sums over the
intervals within the chunk, and `operation` over the others.

A and P are stored transposed, with the earlier key in the rows, so that their products
with dR and dO need no transposition; M_P and M_A are needed both ways.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.delta_rule.tpu.forward import Saved
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
    dot_indicator,
    fit,
    in_turns,
    indicator,
    iota,
    lane_sums,
    left_in_parts,
    right_in_parts,
    store_rows,
    to_lanes,
    to_rows,
    with_rest,
)


class GateGradients(NamedTuple):
    """Gradients for step sizes and log decays, with the keys along the last axis.

    Attributes:
        beta: for the step size of each key.
        within: for the log decay at a key, from intervals within the chunk.
        entry: for the log decay from the chunk's start to a key.
        exit: for the log decay from a key to the chunk's end.
        entry_of_token: for the log decay from the chunk's start to a token.
        total: for the log decay of the whole chunk; to be summed over the lanes.
    """

    beta: Array
    within: Array | None = None
    entry: Array | None = None
    exit: Array | None = None
    entry_of_token: Array | None = None
    total: Array | None = None


def backward(
    q: Float[Array, "B M C HK"],
    k: Float[Array, "B M NC HK"],
    d_o: Float[Array, "B M C HV"],
    gates: Float[Array, "B M G H KEYS"],
    d_states: Float[Array, "S H K V"],
    saved: Saved,
    sequence: Int[Array, " M"] | None,
    exact: bool,
) -> tuple[Array, Array, Array, Array, GateGradients]:
    """Gradients for q, k, v, the initial states and the gates.

    Args:
        gates: as in `forward`; with several steps per token followed by the running
          sums hi and lo at the tokens.
        d_states: gradient for the final states.
    """
    (B, M, C, _), (_, H, K, V) = q.shape, d_states.shape
    NC = k.shape[2]
    name, gated = "delta_rule_backward", gates.shape[2] > 1
    sizes = Sizes.choose(name, H, NC // C, K, V, gated, exact)

    grid = ChunkGrid(B, H, M, sizes.heads, sequence, backward=True)
    packed = sizes.packs * KEYS, KEYS
    states = jax.ShapeDtypeStruct(d_states.shape, jnp.float32)
    d_v = jax.ShapeDtypeStruct((B, M, NC, H * V), k.dtype)
    rows = len(GateGradients._fields) if sizes.gated else 1
    d_gates = jax.ShapeDtypeStruct((B, M, rows, H, KEYS), jnp.float32)
    d_q, d_k, d_v, d_states, d_gates = grid.call(
        partial(_kernel, sizes=sizes),
        name,
        operands=[
            (q, grid.tokens(C, K)),
            (k, grid.tokens(NC, K)),
            (d_o, grid.tokens(C, V)),
            (gates, grid.rows(gates.shape[2], KEYS)),
            (d_states, grid.states(K, V)),
            (saved.S, grid.chunk_states(K, V)),
            (saved.E, grid.tokens(NC, V)),
            (saved.X, grid.stacked(*packed)),
        ],
        results=[
            (jax.ShapeDtypeStruct(q.shape, q.dtype), grid.tokens(C, K)),
            (jax.ShapeDtypeStruct(k.shape, k.dtype), grid.tokens(NC, K)),
            (d_v, grid.tokens(NC, V)),
            (states, grid.states(K, V)),
            (d_gates, grid.rows(rows, KEYS)),
        ],
        scratch=[
            pltpu.VMEM(packed, jnp.float32),
            pltpu.VMEM((sizes.heads, K, V), sizes.operand),
        ],
        vmem=sizes.vmem,
        flops=9 * NC * NC * (K + V) + 12 * NC * K * V,
    )
    return d_q, d_k, d_v, d_states, GateGradients(*jnp.moveaxis(d_gates, 2, 0))


class Refs(NamedTuple):
    """The references that the kernel is called with, in order."""

    q: jax.Ref
    k: jax.Ref
    dO: jax.Ref
    gates: jax.Ref
    d_end: jax.Ref
    S: jax.Ref
    E: jax.Ref
    X: jax.Ref
    dq: jax.Ref
    dk: jax.Ref
    dv: jax.Ref
    dS: jax.Ref
    d_gates: jax.Ref
    X_transposed: jax.Ref
    dS_narrow: jax.Ref


def _kernel(ends, *refs, sizes):
    refs = Refs(*refs)

    @pl.when(ends)
    def _():
        refs.dS[...] = refs.d_end[...]
        refs.dS_narrow[...] = refs.d_end[...].astype(refs.dS_narrow.dtype)

    together = groups(sizes.heads)
    gates = [Gates.read(refs.gates, group, more_columns=True) for group in together]
    for pack in range(sizes.packs):
        rows = slice(pack * KEYS, (pack + 1) * KEYS)
        refs.X_transposed[rows, :] = refs.X[rows, :].T
    heads = [_Head(refs, h, gates[h // GROUP], sizes) for h in range(sizes.heads)]
    for group in together:
        in_turns([heads[h].find_system() for h in group])
    for i in reversed(range(KEYS // BLOCK)):
        for head in heads:
            head.solve_block(i)
    for group in together:
        in_turns([heads[h].write() for h in group])


class _Head:
    """A head's chunk, from its operands to its gradients, in stages.

    Gamma is computed in three forms: `earlier`, from the lane's key to a later row's
    key; `to_tokens`, from the row's key to the lane's token; and `from_tokens`, from
    the lane's key to the row's token. It is 0 for all other pairs.
    """

    def __init__(self, refs, h, gates, sizes):
        self.refs, self.h, self.gates, self.sizes = refs, h, gates, sizes
        self.j, self.row = h % GROUP, slice(h % GROUP, h % GROUP + 1)
        self.dot = partial(dot, precision=EXACT if sizes.exact else None)
        self.key_lanes = slice(h * sizes.K, (h + 1) * sizes.K)
        self.value_lanes = slice(h * sizes.V, (h + 1) * sizes.V)
        self.beta = gates.beta_column(self.j)
        self.Y, self.dR = [], []

    def find_system(self):
        """Compute A^T, the right-hand side and Gamma; a generator for `in_turns`."""
        q, k, gates, sizes = self.read("q"), self.read("k"), self.gates, self.sizes
        steps = sizes.steps
        KK, KQ = self.dot(k, k, transposed=True), self.dot(k, q, transposed=True)
        row, lane = iota(KK.shape, 0), iota(KK.shape, 1)
        sees = lane >= row // steps
        yield
        seen = row >= lane // steps  # tokens in the rows
        if not sizes.gated:
            between = jnp.ones(KK.shape, jnp.float32)
            self.to_tokens = indicator(sees, jnp.float32)
            self.from_tokens = indicator(seen, jnp.float32)
        else:
            decay = partial(gates.entry_and_log, self.j)
            hi, lo = gates.hi[self.row], gates.lo[self.row]
            self.entry, log = decay(gates.columns, hi, lo)
            self.entry_of_token = self.entry
            # Log decays are at most 0, so this is right in both orders of two keys.
            log = to_tokens = from_tokens = -jnp.abs(log)
            if steps > 1:
                token_sums = (
                    self.refs.gates[i, self.h : self.h + 1, :] for i in (3, 4)
                )
                to_tokens = -decay(gates.columns, *token_sums)[1]
                columns = dot(indicator(lane == steps * row), gates.columns)
                self.entry_of_token, from_tokens = decay(columns, hi, lo)
            between = jnp.exp(log)
            self.to_tokens = jnp.exp(jnp.where(sees, to_tokens, -jnp.inf))
            seen &= row < KEYS // steps
            self.from_tokens = jnp.exp(jnp.where(seen, from_tokens, -jnp.inf))
        self.earlier = jnp.where(row > lane, between, 0.0)
        self.KK, self.KQ = KK, KQ
        self.A = jnp.where(row < lane, KK * between, 0.0)
        P = (KQ * self.to_tokens).astype(sizes.operand)
        yield
        dS = self.dot(*with_rest(k, self.refs.dS[self.h], sizes.exact))
        if sizes.gated:
            self.exit = gates.exit_column(self.j)
            dS = fit(self.exit, sizes.V) * dS
        self.side = dS + self.dot(P, self.read("dO"))

    def solve_block(self, i):
        exact, rows = self.sizes.exact, slice(i * BLOCK, (i + 1) * BLOCK)
        pack = pack_row(self.h) + self.h % PACK * BLOCK
        X = self.refs.X_transposed[pl.ds(pack, BLOCK), :]
        X = left_in_parts(X, rows.start, BLOCK, exact)
        side = fit(self.beta[rows], self.sizes.V) * self.side[rows]
        dR = self.dot(X, right_in_parts(side, exact))
        A = left_in_parts(self.A[: rows.stop], rows.start, BLOCK, exact)
        rest = self.side - self.dot(A, right_in_parts(dR, exact))
        self.side = rest[: rows.start]
        self.Y.insert(0, rest[rows])
        self.dR.insert(0, dR)
        store_rows(self.refs.dv, rows.start, self.value_lanes, dR)

    def write(self):
        """Compute and store the gradients; a generator for `in_turns`."""
        refs, sizes, dot = self.refs, self.sizes, self.dot
        q, k, dO, E = self.read("q"), self.read("k"), self.read("dO"), self.read("E")
        S, dS, dR = refs.S[self.h], refs.dS[self.h], jnp.concatenate(self.dR, 0)
        narrow = dR.astype(sizes.operand)
        U = (fit(self.beta, sizes.V) * E.astype(jnp.float32)).astype(sizes.operand)

        # The estimator of v5e fails on products that transpose a computed operand.
        beta = self.gates.beta[self.row]
        M_A = dot(narrow, E, transposed=True) * (-beta * self.earlier)
        M_P_transposed = dot(U, dO, transposed=True) * self.to_tokens
        M_P = dot(dO, E, transposed=True) * (beta * self.from_tokens)
        yield
        d_q = dot(dO, S, transposed=True)
        entry = dot(narrow, S, transposed=True)
        exit = dot(U, refs.dS_narrow[self.h], transposed=True)
        dO_entry, dR_entry = dO, dR
        if sizes.gated:
            d_q = fit(self.entry_of_token, sizes.K) * d_q
            entry = fit(self.entry, sizes.K) * entry
            exit = fit(self.exit, sizes.K) * exit
            dO_entry = fit(self.entry_of_token, sizes.V) * dO.astype(jnp.float32)
            dR_entry = fit(self.entry, sizes.V) * dR
        yield
        M_A_transposed = M_A.T
        d_k = dot(M_P_transposed.astype(sizes.operand), q)
        d_k += dot((M_A + M_A_transposed).astype(sizes.operand), k)
        store_rows(refs.dk, 0, self.key_lanes, d_k + exit - entry)
        yield
        intervals = M_P_transposed * self.KQ, M_A_transposed * self.KK
        self.write_gates(E, d_q, entry, exit, *intervals)
        yield
        d_q += dot(M_P.astype(sizes.operand), k)
        store_rows(refs.dq, 0, self.key_lanes, d_q)
        yield
        if sizes.gated:
            dS = self.gates.total[self.row] * dS
        q_transposed, k_transposed = q.astype(jnp.float32).T, k.astype(jnp.float32).T
        dS += dot(q_transposed.astype(sizes.operand), dO_entry.astype(sizes.operand))
        dS -= dot(*with_rest(k_transposed, dR_entry, sizes.exact))
        refs.dS[self.h] = dS
        refs.dS_narrow[self.h] = dS.astype(sizes.operand)

    def write_gates(self, E, d_q, entry, exit, d_to_tokens, d_to_keys):
        """Store the rows of the gates' gradients.

        Args:
            d_to_tokens, d_to_keys: gradients for the intervals from a key, in the rows,
              to a token or to a key.
        """
        refs, sizes, h = self.refs, self.sizes, self.h
        E_Y = E.astype(jnp.float32) * jnp.concatenate(self.Y, 0)
        if not sizes.gated:
            refs.d_gates[0, h : h + 1, :] = lane_sums([E_Y], sizes.exact)[:1]
            return
        q, k = self.read("q").astype(jnp.float32), self.read("k").astype(jnp.float32)
        sums = lane_sums([E_Y, -entry * k, exit * k, d_q * q], sizes.exact)
        row, lane = iota(d_to_keys.shape, 0), iota(d_to_keys.shape, 1)
        if sizes.steps == 1:
            crossing = dot_indicator(d_to_keys + d_to_tokens, row >= lane, sizes.exact)
        else:
            crossing = dot_indicator(d_to_keys, row >= lane, sizes.exact)
            sees = row >= lane // sizes.steps
            crossing += dot_indicator(d_to_tokens, sees, sizes.exact)
        within = jnp.sum(jnp.where(row < lane, crossing, 0.0), 0, keepdims=True)
        total = jnp.sum(refs.dS[h] * refs.S[h].astype(jnp.float32), 0, keepdims=True)
        total = self.gates.total[self.row] * to_lanes(total)
        rows = GateGradients(sums[:1], within, sums[1:2], sums[2:3], sums[3:4], total)
        for i, row in enumerate(rows):
            refs.d_gates[i, h : h + 1, :] = row

    def read(self, name):
        """The head's part of an operand, padded to KEYS rows."""
        ref = getattr(self.refs, name)
        lanes = self.key_lanes if name in "qk" else self.value_lanes
        return to_rows(ref[:, lanes], KEYS).astype(self.sizes.operand)
