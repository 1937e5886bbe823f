"""The delta rule in chunks: matrix products instead of a step per token.

Per head and chunk of C tokens with N C keys, with incoming state S, and with decay
factors Gamma_ij (token j to token i), gamma_i (chunk start to i) and epsilon_j (j to
chunk end):

    A = strict_tril(K K^T * Gamma),  L = diag(beta) A,  P = tril(Q K^T * Gamma)
    (I + L) [U0 W] = diag(beta) [V  diag(gamma) K]
    U  = U0 - W S                                       written at each key
    S' = gamma_C S + (diag(epsilon) K)^T U
    O  = diag(gamma) Q S + P U

Only the two lines for U and S' run one chunk after another; everything else is a
batched product over a group of chunks. The N keys of a token share its decay factors,
and a token sees all of its own keys; there is one query per token.

Reference: Yang et al., Gated Delta Networks, arXiv 2412.06464; Siems et al.,
DeltaProduct, arXiv 2502.10297.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import layout, streams
from pallas_kernels.decay import Decay, decay, gradient
from pallas_kernels.delta_rule import accurate, block_sizes, triangular
from pallas_kernels.products import EXACT, Product, input_product


class Products(NamedTuple):
    """Products of the inputs, in their type, and products in the solution for U."""

    inputs: Product
    solution: Product


class Chunks(NamedTuple):
    """The operands, a row of C tokens (q, g) or N C keys (k, v, beta) per chunk."""

    q: Float[Array, "M B H C K"]
    k: Float[Array, "M B H NC K"]
    v: Float[Array, "M B H NC V"]
    beta: Float[Array, "M B H NC"]
    g: Float[Array, "M B H C"] | None


def chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T N H K"],
    v: Float[Array, "B T N H V"],
    beta: Float[Array, "B T N H"],
    g: Float[Array, "B T H"] | None,
    states: Float[Array, "S B H K V"],
    cu_seqlens: Int[Array, "S+1"] | None,
    chunk_size: int | None,
    precision: jax.lax.Precision | None,
    empty: bool,
) -> tuple[Float[Array, "B T H V"], Float[Array, "S B H K V"]]:
    """Run the chunked form; arguments and results as in `reference.token_recurrence`.

    Args:
        cu_seqlens: the start of each sequence and the end of the last one (B is 1);
          None for one sequence per batch row.
        chunk_size: tokens per chunk, at most T, rounded up to a power of two.
        precision: of the products with inputs and states; None takes HIGHEST for
          operands of 32 bits and more.
        empty: whether the states are zero; a single chunk does not read them then.
    """
    T, N = k.shape[1:3]
    if chunk_size is None:
        C = block_sizes.chunk_size(T, N, max(q.shape[-1], v.shape[-1]))
    else:
        C = layout.round_up_to_power_of_two(min(chunk_size, T))
    where = layout.arrange(T, C, q.shape[0] * q.shape[2] * C * N, cu_seqlens)
    chunks = Chunks(
        q=layout.by_token(q, where),
        k=layout.by_key(k, where),
        v=layout.by_key(v, where),
        beta=layout.by_key(beta.astype(states.dtype), where),
        g=None if g is None else layout.by_token(g, where),
    )
    inputs = input_product((q, k, v), states.dtype, precision)
    products = Products(inputs, Product(states.dtype, states.dtype, EXACT))
    some_chunks = partial(delta_chunks, products)
    if empty and T <= C and cu_seqlens is None:
        o, states = some_chunks(chunks, None, None)
    else:
        o, states = layout.in_groups(some_chunks, states, chunks, where)
    return layout.to_tokens(o, where, T), states


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def delta_chunks(
    products: Products,
    chunks: Chunks,
    states: Float[Array, "S B H K V"] | None,
    sequence: Int[Array, "M"] | None,
) -> tuple[Float[Array, "M B H C V"], Float[Array, "S B H K V"]]:
    """Outputs and final states; chunk m reads and writes states[sequence[m]].

    Without states there is a single chunk, with a state of zeros before it: U = U0, and
    the compiler drops the solution for W, which only multiplies the state.
    """
    return _forward(products, chunks, states, sequence)[0]


class Prepared(NamedTuple):
    """The results of the chunks' systems that do not depend on a state."""

    factors: Decay
    A: Float[Array, "M B H NC NC"]
    P: Float[Array, "M B H C NC"]
    inverses: Float[Array, "M B H blocks block block"]
    U0: Float[Array, "M B H NC V"]
    W: Float[Array, "M B H NC K"]


def prepare(products: Products, chunks: Chunks) -> Prepared:
    """Solve the systems of all chunks."""
    q, k, v, beta, g = chunks
    steps = k.shape[-2] // q.shape[-2]
    factors = NO_DECAY if g is None else decay(g)
    A, A_rest, P = _scores(products, chunks, factors)
    L = beta[..., None] * A
    inverses = triangular.invert_diagonal_blocks(
        L, block_sizes.solve_block(L.shape[-1])
    )
    k = k.astype(beta.dtype)
    Y_v = beta[..., None] * v.astype(beta.dtype)
    Y_k = beta[..., None] * scaled(k, _per_key(factors.entry, steps))
    U0 = triangular.solve(L, inverses, Y_v)
    W = triangular.solve(L, inverses, Y_k)
    if A_rest is not None:
        error = accurate.residual(L, beta[..., None] * A_rest, Y_k, W)
        W += triangular.solve(L, inverses, error)
    return Prepared(factors, A, P, inverses, U0, W)


def exit_keys(chunks: Chunks, factors: Decay) -> Float[Array, "M B H NC K"]:
    """diag(epsilon) K."""
    steps = chunks.k.shape[-2] // chunks.q.shape[-2]
    return scaled(chunks.k.astype(chunks.beta.dtype), _per_key(factors.exit, steps))


def _forward(products, chunks, states, sequence):
    prepared = prepare(products, chunks)
    factors, P = prepared.factors, prepared.P
    k_exit = exit_keys(chunks, factors)
    if states is None:
        U = prepared.U0
        o = products.inputs("mbhcn,mbhnv->mbhcv", P, U)
        states = products.inputs("mbhnk,mbhnv->mbhkv", k_exit, U)
        prepared = prepared._replace(U0=None, W=None)
        return (o, states), (chunks, sequence, prepared, U, None)

    def chunk(S, operands):
        U0, W, k_exit, total = operands
        U = U0 - products.solution("bhnk,bhkv->bhnv", W, S)
        S_next = _shrunk(S, total) + products.inputs("bhnk,bhnv->bhkv", k_exit, U)
        return S_next, (U, S)

    operands = (prepared.U0, prepared.W, k_exit, factors.total)
    states, (U, S) = streams.scan(chunk, states, operands, sequence)
    o = scaled(products.inputs("mbhck,mbhkv->mbhcv", chunks.q, S), factors.entry)
    o += products.inputs("mbhcn,mbhnv->mbhcv", P, U)
    return (o, states), (chunks, sequence, prepared._replace(U0=None), U, S)


def _backward(products, residuals, gradients):
    """Gradients by hand: the systems are solved again, transposed.

    With dO and dS' given,
        dU = P^T dO + diag(epsilon) K dS',      (I + L)^T dR = dU
        dS = gamma_C dS' + (diag(gamma) Q)^T dO - W^T dU
    and then every other gradient is a batched product over all chunks.
    """
    chunks, sequence, prepared, U, S = residuals
    dO, d_states = gradients
    dU_output = products.inputs("mbhcn,mbhcv->mbhnv", prepared.P, dO)
    k_exit, total = exit_keys(chunks, prepared.factors), prepared.factors.total
    if S is None:
        dU = dU_output + products.inputs("mbhnk,mbhkv->mbhnv", k_exit, d_states)
        d_chunks = chunk_gradients(products, chunks, prepared, U, S, dO, dU, d_states)
        return d_chunks, None, None

    dS_output = products.inputs(
        "mbhck,mbhcv->mbhkv", chunks.q, scaled(dO, prepared.factors.entry)
    )

    def chunk(dS_next, operands):
        dU_output, dS_output, W, k_exit, total = operands
        dU = dU_output + products.inputs("bhnk,bhkv->bhnv", k_exit, dS_next)
        dS = _shrunk(dS_next, total) + dS_output
        dS -= products.solution("bhnk,bhnv->bhkv", W, dU)
        return dS, (dU, dS_next)

    operands = (dU_output, dS_output, prepared.W, k_exit, total)
    d_states, (dU, dS_next) = streams.scan(
        chunk, d_states, operands, sequence, reverse=True
    )
    d_chunks = chunk_gradients(products, chunks, prepared, U, S, dO, dU, dS_next)
    return d_chunks, d_states, None


def chunk_gradients(
    products: Products,
    chunks: Chunks,
    prepared: Prepared,
    U: Float[Array, "M B H NC V"],
    S: Float[Array, "M B H K V"] | None,
    dO: Float[Array, "M B H C V"],
    dU: Float[Array, "M B H NC V"],
    dS_next: Float[Array, "M B H K V"],
) -> Chunks:
    """Gradients for the operands of each chunk, from those for U and the states.

    Without S the states are zero.

    (I + L)^T dR = dU,   dP = dO U^T,   dL = -dR U^T
    dQ = diag(gamma) dO S^T + (dP * Gamma) K
    dK = (dP * Gamma)^T Q + (M + M^T) K - diag(beta gamma) dR S^T
         + diag(epsilon) U dS'^T,   M = diag(beta) dL * Gamma
    dV = diag(beta) dR
    dbeta_i = sum_j dL_ij A_ij + dR_i . (v_i - gamma_i S^T k_i)
    """
    q, k, v, beta, g = chunks
    factors, A, P, inverses = prepared[:4]
    steps = k.shape[-2] // q.shape[-2]
    entry, exit = _per_key(factors.entry, steps), _per_key(factors.exit, steps)
    L = beta[..., None] * A
    k_state, v_state = k.astype(U.dtype), v.astype(U.dtype)

    dR = triangular.solve_transposed(L, inverses, dU)
    dP = _causal(products.inputs("mbhcv,mbhnv->mbhcn", dO, U), steps)
    dL = -_strictly_causal(products.solution("mbhiv,mbhjv->mbhij", dR, U))

    if S is None:
        q_state, k_entry = jnp.zeros(q.shape, U.dtype), jnp.zeros(k.shape, U.dtype)
        d_total = jnp.zeros(q.shape[:3], U.dtype)
    else:
        dO_entry = scaled(dO, factors.entry)
        q_state = products.inputs("mbhcv,mbhkv->mbhck", dO_entry, S)
        k_entry = scaled(products.solution("mbhnv,mbhkv->mbhnk", dR, S), entry)
        d_total = jnp.sum(dS_next * S, (-1, -2))
    k_last = scaled(products.inputs("mbhnv,mbhkv->mbhnk", U, dS_next), exit)
    M_P = _decayed(dP, factors.within, 1, steps)
    M_L = _decayed(beta[..., None] * dL, factors.within, steps, steps)
    M_L += jnp.swapaxes(M_L, -1, -2)

    d_beta = jnp.sum(dL * A, -1) + jnp.sum(dR * v_state, -1)
    d_beta -= jnp.sum(k_entry * k_state, -1)
    d_v = beta[..., None] * dR
    d_q = q_state + products.inputs("mbhcn,mbhnk->mbhck", M_P, k)
    d_k = products.inputs("mbhcn,mbhck->mbhnk", M_P, q)
    d_k += products.inputs("mbhij,mbhjk->mbhik", M_L, k)
    d_k += k_last - beta[..., None] * k_entry

    d_g = None
    if g is not None:
        d_entry = jnp.sum(q_state * q.astype(U.dtype), -1)
        d_entry -= _per_token(beta * jnp.sum(k_entry * k_state, -1), steps)
        within = _pairs(dL * L, steps) + _per_token(dP * P, steps)
        d_log = Decay(
            within=within,
            entry=d_entry,
            exit=_per_token(jnp.sum(k_last * k_state, -1), steps),
            total=factors.total * d_total,
        )
        d_g = gradient(g, d_log)
    d_chunks = Chunks(d_q, d_k, d_v, d_beta, d_g)
    return jax.tree.map(lambda d, x: d.astype(x.dtype), d_chunks, chunks)


delta_chunks.defvjp(_forward, _backward)

NO_DECAY = Decay(*[None] * 4)  # pyright: ignore[reportArgumentType]


def _scores(products, chunks, factors):
    """A and P: the decayed products of keys with keys and of queries with keys.

    A is returned as its rounded value and the rest; the rest is None if the products
    themselves have less precision than the states.
    """
    q, k = chunks.q, chunks.k
    steps = k.shape[-2] // q.shape[-2]
    qk = products.inputs("mbhik,mbhjk->mbhij", q, k)
    P = _causal(_decayed(qk, factors.within, 1, steps), steps)
    if products.inputs == products.solution:
        kk, kk_rest = accurate.gram(k.astype(products.solution.operand))
    else:
        kk, kk_rest = products.inputs("mbhik,mbhjk->mbhij", k, k), None

    def decayed(x):
        return _strictly_causal(_decayed(x, factors.within, steps, steps))

    return decayed(kk), None if kk_rest is None else decayed(kk_rest), P


def _causal(x, steps):
    """x, but zero where the key's token is later than the query's."""
    token, key = x.shape[-2:]
    visible = jnp.arange(token)[:, None] >= jnp.arange(key)[None, :] // steps
    return jnp.where(visible, x, jnp.zeros((), x.dtype))


def _strictly_causal(x):
    """x, but zero on and above the diagonal."""
    return jnp.tril(x, -1)


def _decayed(x, within, row_steps, column_steps):
    """x * Gamma, each token's factor repeated for its steps."""
    if within is None:
        return x
    within = jnp.repeat(within, row_steps, axis=-2)
    return x * jnp.repeat(within, column_steps, axis=-1)


def scaled(x, factor):
    """diag(factor) x; just x without a factor."""
    return x if factor is None else factor[..., None] * x


def _shrunk(S, total):
    """total S; just S without a factor."""
    return S if total is None else total[..., None, None] * S


def _per_key(factor, steps):
    """A token's factor for each of its keys."""
    return None if factor is None else jnp.repeat(factor, steps, axis=-1)


def _per_token(x, steps):
    """Sum the last axis over the keys of a token."""
    return jnp.sum(x.reshape(*x.shape[:-1], -1, steps), axis=-1)


def _pairs(x, steps):
    """Sum a matrix of pairs of keys over the keys of two tokens."""
    rows = jnp.swapaxes(_per_token(x, steps), -1, -2)
    return jnp.swapaxes(_per_token(rows, steps), -1, -2)
