"""Gated linear attention as one TPU kernel: the state stays in VMEM between chunks.

Per head and chunk of 128 tokens, with the decayed scores P and queries and keys Q~ and
K~ of `decays`:

    O  = Q~ S + P V
    S' = diag(gamma_C) S + K~^T V

The state is transposed, [V, K], so that its decays multiply rows of lanes, which is
free, and only the values have to be transposed for the sum.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_attention.tpu.decays import decays_of, product_of
from pallas_kernels.linear_attention.tpu.sizes import CHUNK, Sizes
from pallas_kernels.tpu.chunk_grid import ChunkGrid
from pallas_kernels.tpu.tiles import in_turns


def forward(
    q: Float[Array, "B M C HK"],
    k: Float[Array, "B M C HK"],
    v: Float[Array, "B M C HV"],
    g: Float[Array, "B M 2 H C"] | Float[Array, "B M C HK"] | None,
    states: Float[Array, "S H V K"],
    sequence: Int[Array, " M"] | None,
    exact: bool,
    save: bool,
) -> tuple[Array, Array, Array | None]:
    """Outputs, final states and, with `save`, the state before each chunk.

    Args:
        g: log decays of the heads as running sums hi and lo, or of the channels as
          given.
        states: transposed.
        sequence: index of each chunk's state; None for one state per row.
        exact: whether products are float32.
    """
    (B, M, C, _), (_, H, V, K) = q.shape, states.shape
    name = "linear_attention_forward"
    sizes = Sizes.choose(name, H, K, V, g, exact)
    grid = ChunkGrid(B, H, M, sizes.heads, sequence)
    key_block, value_block = grid.tokens(C, K), grid.tokens(C, V)
    results = [
        (jax.ShapeDtypeStruct(v.shape, v.dtype), value_block),
        (jax.ShapeDtypeStruct(states.shape, jnp.float32), grid.states(V, K)),
    ]
    if save:
        before = jax.ShapeDtypeStruct((B, M, H, V, K), sizes.operand)
        results.append((before, grid.chunk_states(V, K)))
    operands = [
        (q, key_block),
        (k, key_block),
        (v, value_block),
        (states, grid.states(V, K)),
    ]
    if g is not None:
        operands.append((g, grid.rows(2, CHUNK) if g.ndim == 5 else key_block))
    o, final, *before = grid.call(
        partial(_kernel, sizes=sizes),
        name,
        operands=operands,
        results=results,
        scratch=[],
        vmem=sizes.vmem,
        flops=2 * C * C * (K + V) + 4 * C * K * V,
    )
    return o, final, before[0] if save else None


def _kernel(begins, *refs, sizes):
    q_ref, k_ref, v_ref, start_ref, *refs = refs
    g_ref = refs.pop(0) if sizes.decay else None
    o_ref, S_ref, *before_ref = refs

    @pl.when(begins)
    def _():
        S_ref[...] = start_ref[...]

    for ref in before_ref:
        ref[...] = S_ref[...].astype(ref.dtype)

    def head(h, decay):
        key_lanes, value_lanes = sizes.key_lanes(h), sizes.value_lanes(h)
        q, k, v = q_ref[:, key_lanes], k_ref[:, key_lanes], v_ref[:, value_lanes]
        scores = yield from decay.scores(q, k)
        o = product(scores.pairs, v) + product(scores.q, S_ref[h], transposed=True)
        o_ref[:, value_lanes] = o.astype(o_ref.dtype)
        yield
        S = S_ref[h] if scores.total is None else scores.total * S_ref[h]
        S_ref[h] = S + product(v.astype(jnp.float32).T, scores.k)

    product = product_of(sizes.exact)
    decays = decays_of(g_ref, sizes)
    for heads in sizes.together:
        in_turns([head(h, decays[h]) for h in heads])
