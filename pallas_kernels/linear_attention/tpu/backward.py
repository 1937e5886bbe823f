"""The gradient of gated linear attention as one TPU kernel, from the last chunk on.

Per head and chunk, with the scores P, Q~ and K~, the state S before the chunk and the
gradients dO and dS' given:

    dV = P^T dO + K~ dS'
    dP = dO V^T,   dQ~ = dO S^T,   dK~ = V dS'^T,   d gamma_C = sum over V of S * dS'
    dS = diag(gamma_C) dS' + Q~^T dO

States stand turned, [V, K], as in `forward`; `decays` takes the gradients of the scores
on to q, k and g.
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

GATE_ROWS = 4  # of a head's decay, see `HeadDecay.gradients`


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
    """Gradients of q, k, v, of the initial states and of g.

    Args:
        g: as `forward` takes it; its gradient is [B, M, 4, H, C] or [B, M, C, H K].
        before: the states before each chunk, from `forward`.
        d_states: of the final states.
    """
    (B, M, C, _), (_, H, V, K) = q.shape, d_states.shape
    name = "linear_attention_backward"
    sizes = Sizes.choose(name, H, K, V, g, exact)
    grid = ChunkGrid(B, H, M, sizes.heads, sequence, backward=True)
    of_keys, of_values = grid.tokens(C, K), grid.tokens(C, V)
    of_states = grid.states(V, K)
    operands = [
        *((q, of_keys), (k, of_keys), (v, of_values), (d_o, of_values)),
        (before, grid.chunk_states(V, K)),
        (d_states, of_states),
    ]
    results = [
        (jax.ShapeDtypeStruct(q.shape, q.dtype), of_keys),
        (jax.ShapeDtypeStruct(k.shape, k.dtype), of_keys),
        (jax.ShapeDtypeStruct(v.shape, v.dtype), of_values),
        (jax.ShapeDtypeStruct(d_states.shape, jnp.float32), of_states),
    ]
    if g is not None and sizes.decay == "head":
        operands.append((g, grid.rows(2, CHUNK)))
        d_g = jax.ShapeDtypeStruct((B, M, GATE_ROWS, H, CHUNK), jnp.float32)
        results.append((d_g, grid.rows(GATE_ROWS, CHUNK)))
    elif g is not None:
        operands.append((g, of_keys))
        results.append((jax.ShapeDtypeStruct(g.shape, jnp.float32), of_keys))
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
        of_keys, of_values = sizes.of_keys(h), sizes.of_values(h)
        q, k = q_ref[:, of_keys], k_ref[:, of_keys]
        v, dO = v_ref[:, of_values], do_ref[:, of_values]

        def of_scores():
            before = S_ref[h].astype(jnp.float32)
            return ScoreGradients(
                pairs=product(dO, v, transposed=True),
                turned=product(v, dO, transposed=True),
                q=product(dO, S_ref[h]),
                k=product(v, narrow_ref[h]),
                total=jnp.sum(dS_ref[h] * before, 0, keepdims=True),
            )

        scores, (d_q, d_k, d_g) = yield from decay.gradients(q, k, of_scores)
        d_v = product(scores.pairs, dO)
        d_v += product(scores.k, narrow_ref[h], transposed=True)
        dv_ref[:, of_values] = d_v.astype(dv_ref.dtype)
        dq_ref[:, of_keys] = d_q.astype(dq_ref.dtype)
        dk_ref[:, of_keys] = d_k.astype(dk_ref.dtype)
        if sizes.decay == "head":
            for i, row in enumerate(d_g):
                dg_ref[0][i, h : h + 1, :] = row
        elif sizes.decay == "channel":
            dg_ref[0][:, of_keys] = d_g
        yield
        dS = dS_ref[h] if scores.total is None else scores.total * dS_ref[h]
        dS += product(dO.astype(jnp.float32).T, scores.q)
        dS_ref[h] = dS
        narrow_ref[h] = dS.astype(narrow_ref.dtype)

    product = product_of(sizes.exact)
    decays = decays_of(g_ref, sizes)
    for heads in sizes.together:
        in_turns([head(h, decays[h]) for h in heads])
