"""The gradient of gated linear attention as one TPU kernel, from the last chunk back.

Per head and chunk, given the scores P, Q~ and K~, the state S before the chunk and the
gradients dO and dS':

    dV = P^T dO + K~ dS'
    dP = dO V^T,   dQ~ = dO S^T,   dK~ = V dS'^T,   d gamma_C = sum over V of S * dS'
    dS = diag(gamma_C) dS' + Q~^T dO

States are transposed, [V, K], as in `forward`; `decays` has the gradients of the scores
with respect to q, k and g.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_attention.tpu.decays import (
    ScoreGradients,
    decays_of,
    product_of,
)
from pallas_kernels.linear_attention.tpu.sizes import CHUNK, Sizes
from pallas_kernels.tpu.chunk_grid import ChunkGrid
from pallas_kernels.tpu.tiles import in_turns

GATE_ROWS = 4  # of the gradient of a head's decay, see `HeadDecay.gradients`


def backward(
    q: Float[Array, "B M C HK"],
    k: Float[Array, "B M C HK"],
    v: Float[Array, "B M C HV"],
    d_o: Float[Array, "B M C HV"],
    g: Float[Array, "B M 2 H C"] | Float[Array, "B M C HK"] | None,
    before: Float[Array, "B M H V K"],
    d_states: Float[Array, "S H V K"],
    sequence: Int[Array, " M"] | None,
    exact: bool,
) -> tuple[Array, Array, Array, Array, Array | None]:
    """Gradients for q, k, v, the initial states and g.

    Args:
        g: as in `forward`; its gradient is [B, M, 4, H, C] or [B, M, C, H K].
        before: the states before each chunk, from `forward`.
        d_states: gradient for the final states.
    """
    (B, M, C, _), (_, H, V, K) = q.shape, d_states.shape
    name = "linear_attention_backward"
    sizes = Sizes.choose(name, H, K, V, g, exact)
    grid = ChunkGrid(B, H, M, sizes.heads, sequence, backward=True)
    key_block, value_block = grid.tokens(C, K), grid.tokens(C, V)
    state_block = grid.states(V, K)
    operands = [
        (q, key_block),
        (k, key_block),
        (v, value_block),
        (d_o, value_block),
        (before, grid.chunk_states(V, K)),
        (d_states, state_block),
    ]
    results = [
        (jax.ShapeDtypeStruct(q.shape, q.dtype), key_block),
        (jax.ShapeDtypeStruct(k.shape, k.dtype), key_block),
        (jax.ShapeDtypeStruct(v.shape, v.dtype), value_block),
        (jax.ShapeDtypeStruct(d_states.shape, jnp.float32), state_block),
    ]
    if g is not None and sizes.decay == "head":
        operands.append((g, grid.rows(2, CHUNK)))
        d_g = jax.ShapeDtypeStruct((B, M, GATE_ROWS, H, CHUNK), jnp.float32)
        results.append((d_g, grid.rows(GATE_ROWS, CHUNK)))
    elif g is not None:
        operands.append((g, key_block))
        results.append((jax.ShapeDtypeStruct(g.shape, jnp.float32), key_block))
    d_q, d_k, d_v, d_states, *d_g = grid.call(
        partial(_kernel, sizes=sizes),
        name,
        operands=operands,
        results=results,
        scratch=[pltpu.VMEM((sizes.heads, V, K), sizes.operand)],
        vmem=sizes.vmem,
        flops=6 * C * C * (K + V) + 8 * C * K * V,
    )
    return d_q, d_k, d_v, d_states, d_g[0] if d_g else None


def _kernel(ends, *refs, sizes):
    q_ref, k_ref, v_ref, do_ref, S_ref, d_end_ref, *refs = refs
    g_ref = refs.pop(0) if sizes.decay else None
    dq_ref, dk_ref, dv_ref, dS_ref, *dg_ref, narrow_ref = refs

    @pl.when(ends)
    def _():
        dS_ref[...] = d_end_ref[...]
        narrow_ref[...] = d_end_ref[...].astype(narrow_ref.dtype)

    def head(h, decay):
        key_lanes, value_lanes = sizes.key_lanes(h), sizes.value_lanes(h)
        q, k = q_ref[:, key_lanes], k_ref[:, key_lanes]
        v, dO = v_ref[:, value_lanes], do_ref[:, value_lanes]

        def score_gradients():
            before = S_ref[h].astype(jnp.float32)
            return ScoreGradients(
                pairs=product(dO, v, transposed=True),
                transposed_pairs=product(v, dO, transposed=True),
                q=product(dO, S_ref[h]),
                k=product(v, narrow_ref[h]),
                total=jnp.sum(dS_ref[h] * before, 0, keepdims=True),
            )

        scores, (d_q, d_k, d_g) = yield from decay.gradients(q, k, score_gradients)
        d_v = product(scores.pairs, dO)
        d_v += product(scores.k, narrow_ref[h], transposed=True)
        dv_ref[:, value_lanes] = d_v.astype(dv_ref.dtype)
        dq_ref[:, key_lanes] = d_q.astype(dq_ref.dtype)
        dk_ref[:, key_lanes] = d_k.astype(dk_ref.dtype)
        if sizes.decay == "head":
            for i, row in enumerate(d_g):
                dg_ref[0][i, h : h + 1, :] = row
        elif sizes.decay == "channel":
            dg_ref[0][:, key_lanes] = d_g
        yield
        dS = dS_ref[h] if scores.total is None else scores.total * dS_ref[h]
        dS += product(dO.astype(jnp.float32).T, scores.q)
        dS_ref[h] = dS
        narrow_ref[h] = dS.astype(narrow_ref.dtype)

    product = product_of(sizes.exact)
    decays = decays_of(g_ref, sizes)
    for heads in sizes.together:
        in_turns([head(h, decays[h]) for h in heads])
