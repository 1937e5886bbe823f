"""One token of the delta rule as a TPU kernel: every state is read and written once.

What a decode step costs is the state's way from HBM and back. Per head

    S <- e^g S,    then for each of the token's keys
    S <- S + k (beta v - (beta k)^T S)
    o  = q^T S

in float32 on the vector units; keys and queries are turned into columns for it.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.delta_rule.tpu.sizes import MOST_CHANNELS
from pallas_kernels.tiles import LANES, to_rows


def token_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B N H K"],
    v: Float[Array, "B N H V"],
    beta: Float[Array, "B N H"],
    g: Float[Array, "B H"] | None,
    states: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """The output in float32 and the next states, in the place of `states`."""
    B, N, H, K = k.shape
    V, heads = v.shape[-1], _heads_together(H, max(K, v.shape[-1]))
    beta = beta.astype(jnp.float32)[..., None]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    of_keys = jnp.concatenate([q[:, None], k, beta * k], 1)
    of_values = beta * v
    if g is not None:
        decay = jnp.exp(g.astype(jnp.float32))[:, None, :, None]
        decay = jnp.broadcast_to(decay, (B, 1, H, V))
        of_values = jnp.concatenate([of_values, decay], 1)

    def of_heads(*sizes):
        rest = [0] * len(sizes)
        return pl.BlockSpec((None, heads, *sizes), lambda b, h: (b, h, *rest))

    def rows(x):
        block = (None, x.shape[1], heads, x.shape[3])
        return pl.BlockSpec(block, lambda b, h: (b, 0, h, 0))

    return pl.pallas_call(
        lambda *refs: _kernel(*refs, steps=N, gated=g is not None),
        name="delta_rule_step",
        grid=(B, H // heads),
        in_specs=[rows(of_keys), rows(of_values), of_heads(K, V)],
        out_specs=[of_heads(V), of_heads(K, V)],
        out_shape=[
            jax.ShapeDtypeStruct((B, H, V), jnp.float32),
            jax.ShapeDtypeStruct(states.shape, jnp.float32),
        ],
        input_output_aliases={2: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=32 * 2**20
        ),
        cost_estimate=pl.CostEstimate(
            flops=states.size * (4 * N + 3),
            bytes_accessed=4
            * (of_keys.size + of_values.size + 2 * states.size + B * H * V),
            transcendentals=0,
        ),
    )(of_keys, of_values, states)


def _heads_together(H: int, size: int) -> int:
    """Heads of a grid step: whole registers of rows, and states that fit in VMEM."""
    for heads in (16, 8):
        if H % heads == 0 and heads * size <= MOST_CHANNELS:
            return heads
    return H


def _kernel(keys_ref, values_ref, start_ref, o_ref, S_ref, *, steps, gated):
    rows, heads, K = keys_ref.shape
    keys = jnp.concatenate([keys_ref[i] for i in range(rows)], 0)
    columns = to_rows(keys, -(-rows * heads // LANES) * LANES).T

    def column(i, h):
        return columns[:, i * heads + h : i * heads + h + 1]

    for h in range(heads):
        S, row = start_ref[h], slice(h, h + 1)
        if gated:
            S = values_ref[steps, row, :] * S
        for n in range(steps):
            held = jnp.sum(column(1 + steps + n, h) * S, 0, keepdims=True)
            S = S + column(1 + n, h) * (values_ref[n, row, :] - held)
        S_ref[h] = S
        o_ref[row, :] = jnp.sum(column(0, h) * S, 0, keepdims=True)
