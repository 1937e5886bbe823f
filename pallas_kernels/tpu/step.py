"""One token of a linear recurrence as a TPU kernel that reads and writes a state once.

The cost of a decode step is moving the state from HBM and back. Per head

    S <- diag(decay) S,    then for each of the token's keys
    S <- S + k (v - erase^T S)
    o  = q^T S

in float32 on the vector units, for which vectors over the channels of the keys are
transposed into columns.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.tpu.limits import MOST_CHANNELS, vmem
from pallas_kernels.tpu.tiles import LANES, SUBLANES, to_rows


def token_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B N H K"],
    v: Float[Array, "B N H V"],
    erase: Float[Array, "B N H K"] | None,
    decay: Float[Array, "B H"] | Float[Array, "B H K"] | None,
    states: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """The output in float32, and the next states, which overwrite `states`."""
    B, N, H, K = k.shape
    V, heads = v.shape[-1], _heads_together(H, max(K, v.shape[-1]))
    key_rows, value_rows = [q[:, None], k], [v]
    if erase is not None:
        key_rows.append(erase)
    if decay is not None and decay.ndim == 3:
        key_rows.append(decay[:, None])
    elif decay is not None:
        decay = decay[:, None, :, None]
        value_rows.append(jnp.broadcast_to(decay, (B, 1, H, V)))
    key_rows, value_rows = (
        jnp.concatenate([x.astype(jnp.float32) for x in xs], 1)
        for xs in (key_rows, value_rows)
    )

    def head_block(*sizes):
        rest = [0] * len(sizes)
        return pl.BlockSpec((None, heads, *sizes), lambda b, h: (b, h, *rest))

    def row_block(x):
        block = (None, x.shape[1], heads, x.shape[3])
        return pl.BlockSpec(block, lambda b, h: (b, 0, h, 0))

    moved = key_rows.size + value_rows.size + 2 * states.size + B * H * V
    return pl.pallas_call(
        partial(_kernel, steps=N, erases=erase is not None),
        name="token_step",
        grid=(B, H // heads),
        in_specs=[row_block(key_rows), row_block(value_rows), head_block(K, V)],
        out_specs=[head_block(V), head_block(K, V)],
        out_shape=[
            jax.ShapeDtypeStruct((B, H, V), jnp.float32),
            jax.ShapeDtypeStruct(states.shape, jnp.float32),
        ],
        input_output_aliases={2: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=vmem(heads, K, V, exact=False),
        ),
        cost_estimate=pl.CostEstimate(
            flops=states.size * (4 * N + 3), bytes_accessed=4 * moved, transcendentals=0
        ),
    )(key_rows, value_rows, states)


def _heads_together(H: int, size: int) -> int:
    """Heads in a grid step: whole registers of rows, if their states fit in VMEM."""
    for heads in (2 * SUBLANES, SUBLANES):
        if H % heads == 0 and heads * size <= MOST_CHANNELS:
            return heads
    return H


def _kernel(keys_ref, values_ref, start_ref, o_ref, S_ref, *, steps, erases):
    rows, heads, K = keys_ref.shape
    keys = jnp.concatenate([keys_ref[i] for i in range(rows)], 0)
    columns = to_rows(keys, -(-rows * heads // LANES) * LANES).T

    def column(i, h):
        return columns[:, i * heads + h : i * heads + h + 1]

    before_decay = 1 + steps * (2 if erases else 1)
    for h in range(heads):
        S, row = start_ref[h], slice(h, h + 1)
        if values_ref.shape[0] > steps:
            S = values_ref[steps, row, :] * S
        elif rows > before_decay:
            S = column(before_decay, h) * S
        for n in range(steps):
            new = values_ref[n, row, :]
            if erases:
                erase = column(1 + steps + n, h)
                new = new - jnp.sum(erase * S, 0, keepdims=True)
            S = S + column(1 + n, h) * new
        S_ref[h] = S
        o_ref[row, :] = jnp.sum(column(0, h) * S, 0, keepdims=True)
