"""The delta rule as one TPU kernel: the state stays in VMEM from chunk to chunk.

Per head and chunk of 128 keys, with Gamma, gamma and epsilon as in `chunked`:

    L = strict_tril(K K^T * Gamma) diag(beta),  P = tril(Q K^T * Gamma) diag(beta)
    (I + L) E = V - diag(gamma) K S                  the errors that steps correct
    O  = [P  diag(gamma) Q] [E; S]
    S' = gamma_C S + (K^T diag(beta epsilon)) E

The step sizes stand beside the columns here, so that they multiply rows of lanes, which
is free; multiplying rows of sublanes takes a broadcast over lanes, which is dear.

The system is solved by blocks of 32: the diagonal blocks are inverted all at once, 4
heads beside one another in the lanes (`_inverses`), then each block's errors are found
and taken from the blocks below. That chain is latency; the heads of a grid step, which
are independent, fill it.

With bfloat16 operands a product takes one pass of the matrix unit, and the products
that solve the system take x = hi + lo in two bfloat16 parts each, four products in one
pass (`_left`, `_right`): beta up to 2 needs it. With float32 operands all are exact.

The gradient is that of the chunked form, which is computed again for it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import layout
from pallas_kernels.delta_rule.chunked import chunked
from pallas_kernels.products import EXACT, input_product

KEYS = 128  # a chunk, one vector register wide
BLOCK = 32  # of the triangular system
BESIDE = KEYS // BLOCK  # heads beside one another in the lanes
GROUP = 2 * BESIDE  # heads whose blocks fill the sublanes
MOST_STEPS = 8
MOST_HEADS = 24  # a grid step, where their number is no multiple of GROUP
HEAD_SIZES = (64, 128, 256)
NEVER = -200.0  # a log decay whose factor is 0 in float32


def unsupported(arrays: dict[str, Array | None], chunk_size: int | None) -> str | None:
    """Why the kernel cannot take these arguments of `delta_product`, or None."""
    k, v = arrays["k"], arrays["v"]
    assert k is not None and v is not None
    N, H, K = k.shape[2:]
    for name, size in (("K", K), ("V", v.shape[-1])):
        if size not in HEAD_SIZES:
            nearest = min(HEAD_SIZES, key=lambda s: (s < size, abs(s - size)))
            return (
                f"the TPU kernel takes head sizes {HEAD_SIZES}, but {name} is {size}; "
                f"the nearest is {nearest} (pad with zeros), or pass "
                "implementation='xla'."
            )
    if N > MOST_STEPS:
        return (
            f"the TPU kernel takes at most {MOST_STEPS} steps a token, but there are "
            f"{N}; pass implementation='xla'."
        )
    if H > MOST_HEADS and H % GROUP:
        return (
            f"the TPU kernel takes at most {MOST_HEADS} heads or a multiple of "
            f"{GROUP}, but H is {H}; the nearest is {H + -H % GROUP}, or pass "
            "implementation='xla'."
        )
    if chunk_size not in (None, chunk_tokens(N)):
        return (
            f"the TPU kernel's chunk has {chunk_tokens(N)} tokens with {N} steps a "
            f"token, but chunk_size is {chunk_size}; pass None."
        )
    wide = [n for n, x in arrays.items() if x is not None and x.dtype == jnp.float64]
    if wide:
        return f"a TPU has no float64, but {', '.join(wide)} has it; cast to float32."
    return None


def chunk_tokens(steps: int) -> int:
    """Tokens a chunk: a power of two, at most KEYS keys of so many steps a token."""
    return layout.round_up_to_power_of_two(KEYS // steps + 1) // 2


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def fused(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T N H K"],
    v: Float[Array, "B T N H V"],
    beta: Float[Array, "B T N H"],
    g: Float[Array, "B T H"] | None,
    states: Float[Array, "S B H K V"],
    cu_seqlens: Int[Array, "S+1"] | None,
    chunk_size: int | None,
    precision: jax.lax.Precision | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "S B H K V"]]:
    """Run the kernel; arguments and results as in `reference.token_recurrence`.

    The outputs are in v's dtype. Every `precision` but None and DEFAULT is taken as
    HIGHEST. What `unsupported` refuses must not come here.
    """
    del chunk_size
    T, N, H, K = k.shape[1:]
    B, V = q.shape[0], v.shape[-1]
    where = layout.arrange(T, chunk_tokens(N), None, cu_seqlens)

    def by_head(x):
        """[B, T, ..., H, D] to [B, M, keys or tokens, H D]."""
        x = layout.rows(x, where)
        return x.reshape(*x.shape[:2], -1, x.shape[-2] * x.shape[-1])

    def by_lane(x):
        """[B, T, N, H] to [B, M, H, KEYS]."""
        x = layout.rows(x.astype(jnp.float32), where)
        x = jnp.moveaxis(x.reshape(*x.shape[:2], -1, H), 2, 3)
        return jnp.pad(x, [(0, 0)] * 3 + [(0, KEYS - x.shape[-1])])

    inputs = input_product((q, k, v), states.dtype, precision)
    operand = inputs.operand
    # Between one pass and all of them the kernel has no step; more is what it takes.
    exact = inputs.precision not in (None, jax.lax.Precision.DEFAULT)
    gates = [by_lane(beta)]
    if g is not None:  # the decay comes with the first step of a token
        first = jnp.zeros_like(beta, jnp.float32).at[:, :, 0].set(g)
        gates += _running_sum(by_lane(jnp.maximum(first, NEVER)))
    o, final = _call(
        by_head(q.astype(operand)),
        by_head(k.astype(operand)),
        by_head(v.astype(operand)),
        jnp.stack(gates, 2),
        states.reshape(-1, H, K, V),
        where.sequence,
        exact=exact,
    )
    if cu_seqlens is not None:  # no chunk wrote the state of an empty sequence
        empty = (cu_seqlens[1:] == cu_seqlens[:-1])[:, None, None, None]
        final = jnp.where(empty, states.reshape(final.shape), final)
    o = layout.from_rows(o.reshape(B, -1, H, V), where, T)
    return o.astype(v.dtype), final.reshape(states.shape)


def _fused_forward(q, k, v, beta, g, states, cu_seqlens, chunk_size, precision):
    inputs = (q, k, v, beta, g, states, cu_seqlens)
    return fused(*inputs, chunk_size, precision), inputs


def _fused_backward(chunk_size, precision, inputs, gradients):
    *arrays, cu_seqlens = inputs
    d_o, d_states = gradients

    def run(q, k, v, beta, g, states):
        return chunked(q, k, v, beta, g, states, cu_seqlens, None, precision)

    _, pull_back = jax.vjp(run, *arrays)
    return *pull_back((d_o.astype(jnp.float32), d_states)), None


fused.defvjp(_fused_forward, _fused_backward)


class Sizes(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
        heads: of a grid step.
        steps: N, keys a token.
        K, V: of a head.
        gated: whether there is a decay.
        exact: float32 products, else bfloat16 passes.
    """

    heads: int
    steps: int
    K: int
    V: int
    gated: bool
    exact: bool


def heads_together(H: int, K: int, V: int) -> int:
    """Heads of a grid step: enough to fill the chain, few enough for VMEM."""
    if H % GROUP:
        return H
    return 2 * GROUP if H % (2 * GROUP) == 0 and max(K, V) <= 128 else GROUP


def _call(
    q: Float[Array, "B M C HK"],
    k: Float[Array, "B M NC HK"],
    v: Float[Array, "B M NC HV"],
    gates: Float[Array, "B M G H KEYS"],
    states: Float[Array, "S H K V"],
    sequence: Int[Array, " M"] | None,
    exact: bool,
):
    """The kernel over a grid of rows, groups of heads and, in order, chunks."""
    (B, M, C, _), (_, H, K, V) = q.shape, states.shape
    heads = heads_together(H, K, V)
    sizes = Sizes(heads, k.shape[2] // C, K, V, gates.shape[2] > 1, exact)

    def tokens(rows, size):
        return pl.BlockSpec(
            (None, None, rows, heads * size), lambda b, h, m, *_: (b, m, 0, h)
        )

    def owner(b, m, *table):
        """The sequence of a chunk: its row's, or as the table says."""
        return table[0][m] if table else b

    state = pl.BlockSpec(
        (None, heads, K, V), lambda b, h, m, *table: (owner(b, m, *table), h, 0, 0)
    )
    gate = pl.BlockSpec(
        (None, None, gates.shape[2], heads, KEYS), lambda b, h, m, *_: (b, m, 0, h, 0)
    )
    table = () if sequence is None else (sequence.astype(jnp.int32),)
    packs = -(-heads // GROUP) * (GROUP // BESIDE)
    packed = pltpu.VMEM((packs * KEYS, KEYS), jnp.float32)
    return pl.pallas_call(
        partial(_kernel, sizes=sizes),
        name="delta_rule_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(table),
            grid=(B, H // heads, M),
            in_specs=[
                tokens(C, K),
                tokens(k.shape[2], K),
                tokens(k.shape[2], V),
                gate,
                state,
            ],
            out_specs=[tokens(C, V), state],
            scratch_shapes=[packed, packed],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, M, C, H * V), q.dtype),
            jax.ShapeDtypeStruct(states.shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM,
        ),
    )(*table, q, k, v, gates, states)


VMEM = 40 * 2**20  # less than a chip of any generation has


class Gates(NamedTuple):
    """The gates of a group of heads along the keys, [heads, KEYS]."""

    beta: Array
    hi: Array | None  # the log decay up to each key is hi + lo
    lo: Array | None
    exit: Array  # beta times the decay from each key to the chunk's end
    total: Array | None  # [heads, 1]
    columns: Array | None  # [KEYS, KEYS] parts of hi and lo, transposed


def _kernel(*refs, sizes):
    *table, q_ref, k_ref, v_ref, gates_ref, start_ref, o_ref, S_ref, L_ref, X_ref = refs
    m = pl.program_id(2)
    starts = m == 0
    if table:
        starts |= table[0][m] != table[0][jnp.maximum(m, 1) - 1]

    @pl.when(starts)
    def _():
        S_ref[...] = start_ref[...]

    groups = [
        range(h, min(h + GROUP, sizes.heads)) for h in range(0, sizes.heads, GROUP)
    ]
    gates = [_gates(gates_ref, group, sizes) for group in groups]
    heads = [
        _Head(q_ref, k_ref, v_ref, S_ref, h, gates[h // GROUP], sizes)
        for h in range(sizes.heads)
    ]
    _inverses(heads, L_ref, X_ref)
    blocks = KEYS // BLOCK
    for i in range(blocks):
        for head in heads:
            head.solve_block(i, X_ref)
        if i + 1 < blocks:
            for head in heads:
                head.take_from_below(i)
    for head in heads:
        head.write(o_ref)


def _gates(gates_ref, group, sizes) -> Gates:
    rows = slice(group[0], group[-1] + 1)
    beta = gates_ref[0, rows, :]
    if not sizes.gated:
        return Gates(beta, None, None, beta, None, None)
    hi, lo = gates_ref[1, rows, :], gates_ref[2, rows, :]
    last = hi[:, KEYS - 1 :], lo[:, KEYS - 1 :]
    exit = jnp.exp((last[0] - hi) + (last[1] - lo)) * beta
    one = _leading_part(hi)
    two = _leading_part(hi - one)
    parts = [one, two, hi - one - two, lo, jnp.ones_like(lo)]
    unused = KEYS - len(parts) * len(group)
    parts.append(jnp.zeros((unused, KEYS), jnp.float32))
    columns = jnp.concatenate(parts, 0).T.astype(jnp.bfloat16)
    return Gates(beta, hi, lo, exit, jnp.exp(last[0] + last[1]), columns)


class _Head:
    """A head's chunk, from its operands to its results, in stages."""

    def __init__(self, q_ref, k_ref, v_ref, S_ref, h, gates, sizes):
        self.q_ref = q_ref.at[:, h * sizes.K : (h + 1) * sizes.K]
        self.k_ref = k_ref.at[:, h * sizes.K : (h + 1) * sizes.K]
        self.v_ref = v_ref.at[:, h * sizes.V : (h + 1) * sizes.V]
        self.S_ref = S_ref.at[h]
        self.h, self.gates, self.sizes = h, gates, sizes
        self.j = h % GROUP
        self.wide = jnp.float32 if sizes.exact else jnp.bfloat16
        self.dot = partial(_dot, precision=EXACT if sizes.exact else None)
        self.E = []
        self.find_system()

    def find_system(self):
        """L, all that the inverses wait for."""
        k = self.k()
        KK = self.dot(k, k, transposed=True)
        row, column = _iota(KK.shape, 0), _iota(KK.shape, 1)
        within = self.gates.beta[self.j : self.j + 1]
        if self.sizes.gated:
            log, self.entry = self._log_decay(self.gates.columns)
            within = jnp.exp(jnp.where(row >= column, log, -jnp.inf)) * within
        self.within = within
        self.L = jnp.where(row > column, KK * within, 0.0)
        exit = self.gates.exit[self.j : self.j + 1]
        self.k_exit = (k.astype(jnp.float32).T * exit).astype(self.wide)

    def find_sides(self):
        """R, the right-hand side, and the factors of the outputs."""
        q, k, v = self.q_ref[...].astype(self.wide), self.k(), _to_keys(self.v_ref[...])
        self.S = self.S_ref[...].astype(self.wide)
        KS = self.dot(*_with_rest(k, self.S_ref[...]))
        QK = self.dot(q, k, transposed=True)
        sizes, q_entry, within = self.sizes, q, self.within
        token, key = _iota(QK.shape, 0), _iota(QK.shape, 1)
        visible = token >= key // sizes.steps
        if not sizes.gated:
            within = jnp.where(visible, within, 0.0)
        else:
            entry = self.entry
            KS = _fit(entry, sizes.V) * KS
            if sizes.steps > 1:
                own_key = _indicator(key == sizes.steps * token)
                log, entry = self._log_decay(_dot(own_key, self.gates.columns))
                beta = self.gates.beta[self.j : self.j + 1]
                within = jnp.exp(jnp.where(visible, log, -jnp.inf)) * beta
            q_entry = _fit(entry, sizes.K) * q.astype(jnp.float32)
        self.R = v.astype(jnp.float32) - KS
        self.P = (QK * within).astype(self.wide)
        self.q_entry = q_entry.astype(self.wide)

    def k(self):
        return _to_keys(self.k_ref[...]).astype(self.wide)

    def _log_decay(self, columns):
        """Log decay from each key (a lane) to each row, and the factors of entry.

        The running sums come to all lanes by products with zeros and ones, exact for
        the three parts of hi, and lo is as small as their rounding: a broadcast over
        lanes takes the unit that moves them, which has more to do.
        """
        j, gates = self.j, self.gates
        n = gates.beta.shape[0]
        columns = columns.astype(jnp.bfloat16)
        row = _iota((KEYS, KEYS), 0)
        G = _dot(columns, _indicator((row < 3 * n) & (row % n == j)))
        lo_column, ones = row == 3 * n + j, row == 4 * n + j
        lo = jnp.where(lo_column, 1.0, jnp.where(ones, -gates.lo[j : j + 1], 0.0))
        log = (G - gates.hi[j : j + 1]) + _dot(columns, lo.astype(jnp.bfloat16))
        return log, jnp.exp(G)

    def solve_block(self, i, X_ref):
        X = X_ref[pl.ds(_pack_row(self.h) + i * BLOCK, BLOCK), :]
        X = _left(X, self.h % BESIDE * BLOCK, self.sizes.exact)
        self.e = self.dot(X, _right(self.R[:BLOCK], self.sizes.exact))
        self.E.append(self.e)

    def take_from_below(self, i):
        L = _left(self.L[(i + 1) * BLOCK :], i * BLOCK, self.sizes.exact)
        self.R = self.R[BLOCK:] - self.dot(L, _right(self.e, self.sizes.exact))

    def write(self, o_ref):
        V = self.sizes.V
        E = jnp.concatenate(self.E, 0).astype(self.wide)
        o = self.dot(self.P, E) + self.dot(self.q_entry, self.S)
        o_ref[:, self.h * V : (self.h + 1) * V] = o.astype(o_ref.dtype)
        S = self.S_ref[...]
        if self.gates.total is not None:
            S = self.gates.total[self.j : self.j + 1, :] * S
        self.S_ref[...] = S + self.dot(self.k_exit, E)


def _inverses(heads, L_ref, X_ref):
    """Inverses of the diagonal blocks of I + L, by rows of forward substitution.

    BESIDE heads lie beside one another in the lanes: row r of a pack of them holds row
    r of each head's block. Every BLOCK-th row, that is row t of all blocks of two
    packs, makes one register, and X_t = I_t - sum_s<t L_ts X_s runs for all of them at
    once. It keeps the unit that moves lanes busy, and not the matrix unit, which finds
    the other sides of the heads' systems meanwhile.
    """
    rows = GROUP * KEYS // BLOCK // BESIDE
    lane = _iota((BLOCK, KEYS), 1)
    groups = range(-(-len(heads) // GROUP))
    L, X = [], []
    for group in groups:
        for first in (group * GROUP, group * GROUP + BESIDE):
            for i in range(0, KEYS, BLOCK):
                block = jnp.zeros((BLOCK, KEYS), jnp.float32)
                for j, head in enumerate(heads[first : first + BESIDE]):
                    own = head.L[i : i + BLOCK]
                    moved = pltpu.roll(own, (j * BLOCK - i) % KEYS, axis=1)
                    block = jnp.where(lane // BLOCK == j, moved, block)
                L_ref[pl.ds(_pack_row(first) + i, BLOCK), :] = block
        every = [_every(group * GROUP, t, rows) for t in range(BLOCK)]
        L.append(jnp.concatenate([L_ref[row, :] for row in every], 0))
        row = _iota((BLOCK * rows, KEYS), 0) // rows
        X.append(_indicator(row == _iota(row.shape, 1) % BLOCK, jnp.float32))
    for s in range(BLOCK):
        for group in groups:
            X_s, X_below = X[group][:rows], X[group][rows:]
            X_ref[_every(group * GROUP, s, rows), :] = X_s
            below = BLOCK - s - 1
            if below:
                L_below = L[group][(s + 1) * rows :]
                column = _iota(L_below.shape, 1) // BLOCK * BLOCK + s
                product = _gather(L_below, column) * jnp.concatenate([X_s] * below, 0)
                X[group] = X_below - product
        for head in heads[s * len(heads) // BLOCK : (s + 1) * len(heads) // BLOCK]:
            head.find_sides()


def _every(head, t, rows):
    """Row t of all blocks of the head's group."""
    return pl.ds(_pack_row(head) + t, rows, stride=BLOCK)


def _pack_row(head):
    """Row at which the pack of a head starts."""
    return head // BESIDE * KEYS


def _running_sum(g: Float[Array, "*batch KEYS"]) -> tuple[Array, Array]:
    """Sums of g up to each key as hi + lo, to twice the accuracy of float32.

    The difference of two of them, taken part by part, is then accurate also after a
    strong decay.
    """
    hi, lo, distance = g, jnp.zeros_like(g), 1

    def before(x):
        pad = [(0, 0)] * (x.ndim - 1) + [(distance, 0)]
        return jnp.pad(x[..., :-distance], pad)

    while distance < g.shape[-1]:
        total = hi + before(hi)
        part = total - hi
        rest = (hi - (total - part)) + (before(hi) - part)
        hi, lo, distance = total, lo + before(lo) + rest, 2 * distance
    return hi, lo


def _left(x, start, exact):
    """Lanes start to start + BLOCK of x, to be multiplied by `_right`.

    In parts they are [hi lo hi lo], where `_right` stacks [hi; hi; lo; lo].
    """
    if exact:
        return x[:, start : start + BLOCK]
    lane = _iota(x.shape, 1)
    x = _gather(x, start + lane % BLOCK)
    hi = _leading_part(x)
    return jnp.where(lane // BLOCK % 2 == 1, x - hi, hi).astype(jnp.bfloat16)


def _right(x, exact):
    """See `_left`."""
    if exact:
        return x
    hi = _leading_part(x)
    lo = x - hi
    return jnp.concatenate([hi, hi, lo, lo], 0).astype(jnp.bfloat16)


def _with_rest(x, y):
    """Factors of the product x y, y in two parts where x is bfloat16."""
    if x.dtype == y.dtype:
        return x, y
    hi = _leading_part(y)
    parts = jnp.concatenate([hi, y - hi], 0).astype(x.dtype)
    return jnp.concatenate([x, x], 1), parts


def _leading_part(x):
    """x cut to the significand of bfloat16, in float32.

    By its bits: a conversion there and back would be two on chips without bfloat16
    arithmetic, and their compiler folds it.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
    return lax.bitcast_convert_type(bits, jnp.float32)


def _dot(x, y, transposed=False, precision=None):
    """x y, or x y^T, accumulated in float32."""
    contracted = ((1,), (1 if transposed else 0,))
    return lax.dot_general(
        x,
        y,
        (contracted, ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _gather(x, lanes):
    """x[:, lanes], row by row."""
    return jnp.take_along_axis(x, lanes, axis=1, mode="promise_in_bounds")


def _to_keys(x):
    """Rows up to KEYS, of zeros."""
    missing = KEYS - x.shape[0]
    if not missing:
        return x
    return jnp.concatenate([x, jnp.zeros((missing, x.shape[1]), x.dtype)], 0)


def _fit(x, lanes):
    """x, equal in all of its KEYS lanes, in so many."""
    if lanes <= KEYS:
        return x[:, :lanes]
    return jnp.concatenate([x] * (lanes // KEYS), 1)


def _iota(shape, axis):
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _indicator(condition, dtype=jnp.bfloat16):
    """1 where the condition holds, else 0."""
    return jnp.where(condition, 1.0, 0.0).astype(dtype)
