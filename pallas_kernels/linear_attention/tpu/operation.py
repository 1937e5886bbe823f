"""The TPU kernels of gated linear attention as one operation with a gradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import layout, partition
from pallas_kernels.derivatives import first_order_only
from pallas_kernels.linear_attention.tpu.backward import backward
from pallas_kernels.linear_attention.tpu.forward import forward
from pallas_kernels.linear_attention.tpu.sizes import CHUNK
from pallas_kernels.tpu.arrange import (
    by_head,
    by_lane,
    from_head,
    from_lane,
    from_transposed,
    operand_type,
    sums_before,
    sums_from,
    transposed_states,
    unless_empty,
)
from pallas_kernels.tpu.gates import NEVER, running_sum
from pallas_kernels.tpu.step import token_step


def fused(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H"] | Float[Array, "B T H K"] | None,
    states: Float[Array, "S B H K V"],
    cu_seqlens: Int[Array, "S+1"] | None,
    chunk_size: int | None,
    precision: jax.lax.Precision | None,
    empty: bool,
) -> tuple[Float[Array, "B T H V"], Float[Array, "S B H K V"]]:
    """Run the kernels; arguments and results as in `reference.token_recurrence`.

    The outputs are in v's dtype. A single token has a separate kernel, in float32,
    unless its gradient is needed. Every `precision` except None and DEFAULT counts as
    HIGHEST. The caller checks the arguments with `unsupported`.
    """
    del chunk_size, empty
    decay_axes = "BTH" if g is not None and g.ndim == 3 else "BTHK"
    run = partition.divided(
        lambda *arrays: _fused(*arrays, precision),
        ("BTHK", "BTHK", "BTHV", decay_axes, "SBHKV", "S"),
        ("BTHV", "SBHKV"),
    )
    return run(q, k, v, g, states, cu_seqlens)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _fused(q, k, v, g, states, cu_seqlens, precision):
    if q.shape[1] > 1 or cu_seqlens is not None:
        return _run((q, k, v, g, states, cu_seqlens), precision, save=False)[0]
    decay = None if g is None else jnp.exp(g[:, 0].astype(jnp.float32))
    o, final = token_step(q[:, 0], k, v, None, decay, states[0])
    return o[:, None].astype(v.dtype), final[None]


def _fused_forward(q, k, v, g, states, cu_seqlens, precision):
    inputs = (q, k, v, g, states, cu_seqlens)
    results, before = _run(inputs, precision, save=True)
    return results, (inputs, before)


def _run(inputs, precision, save):
    q, k, v, g, states, cu_seqlens = inputs
    where = layout.arrange(q.shape[1], CHUNK, None, cu_seqlens)
    operand, exact = operand_type((q, k, v), states, precision)
    q_rows, k_rows, v_rows = (by_head(x.astype(operand), where) for x in (q, k, v))
    o, final, before = forward(
        q_rows,
        k_rows,
        v_rows,
        _gates(g, where),
        transposed_states(states),
        where.sequence,
        exact,
        save,
    )
    final = unless_empty(from_transposed(final, states), states, cu_seqlens)
    return (from_head(o, where, v), final), before


def _fused_backward(precision, residuals, gradients):
    (q, k, v, g, states, cu_seqlens), before = residuals
    d_o, d_final = gradients
    where = layout.arrange(q.shape[1], CHUNK, None, cu_seqlens)
    operand, exact = operand_type((q, k, v), states, precision)
    q_rows, k_rows, v_rows, d_rows = (
        by_head(x.astype(operand), where) for x in (q, k, v, d_o)
    )
    d_q, d_k, d_v, d_states, d_g = backward(
        q_rows,
        k_rows,
        v_rows,
        d_rows,
        _gates(g, where),
        before,
        transposed_states(d_final),
        where.sequence,
        exact,
    )
    d_states = from_transposed(d_states, states)
    if d_g is not None and d_g.ndim == 5:
        within, entry, exit, total = jnp.moveaxis(d_g, 2, 0)
        d_g = within + sums_from(entry) + sums_before(exit)
        d_g = from_lane(d_g + jnp.sum(total, -1, keepdims=True), where, q.shape[1])
        d_g = d_g[:, :, 0].astype(g.dtype)
    elif d_g is not None:
        d_g = from_head(d_g, where, g)
    return (
        from_head(d_q, where, q),
        from_head(d_k, where, k),
        from_head(d_v, where, v),
        d_g,
        unless_empty(d_states, d_final, cu_seqlens),
        None,
    )


_fused.defvjp(
    first_order_only("gated_linear_attention", _fused_forward, (6,)),
    first_order_only("gated_linear_attention", _fused_backward, (0,)),
)


def _gates(g, where):
    """The log decays in the form that the kernels take."""
    if g is None:
        return None
    if g.ndim == 4:
        return by_head(g.astype(jnp.float32), where)
    return jnp.stack(running_sum(by_lane(jnp.maximum(g, NEVER)[:, :, None], where)), 2)
