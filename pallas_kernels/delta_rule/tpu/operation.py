"""The delta rule's TPU kernels as one operation with a gradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import layout, partition
from pallas_kernels.delta_rule.tpu.backward import GateGradients, backward
from pallas_kernels.delta_rule.tpu.forward import forward
from pallas_kernels.delta_rule.tpu.sizes import KEYS, chunk_tokens
from pallas_kernels.derivatives import first_order_only
from pallas_kernels.tpu.arrange import (
    by_head,
    by_lane,
    from_head,
    from_lane,
    operand_type,
    sums_before,
    sums_from,
    unless_empty,
)
from pallas_kernels.tpu.gates import NEVER, running_sum
from pallas_kernels.tpu.step import token_step


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
    empty: bool,
) -> tuple[Float[Array, "B T H V"], Float[Array, "S B H K V"]]:
    """Run the kernels; arguments and results as in `reference.token_recurrence`.

    The outputs are in v's dtype. A single token has a separate kernel, in float32,
    unless its gradient is needed. Every `precision` except None and DEFAULT counts as
    HIGHEST. The caller checks the arguments with `unsupported`.
    """
    del chunk_size, empty
    run = partition.divided(
        lambda *arrays: _fused(*arrays, precision),
        ("BTHK", "BTNHK", "BTNHV", "BTNH", "BTH", "SBHKV", "S"),
        ("BTHV", "SBHKV"),
    )
    return run(q, k, v, beta, g, states, cu_seqlens)


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _fused(q, k, v, beta, g, states, cu_seqlens, precision):
    inputs = (q, k, v, beta, g, states, cu_seqlens)
    if q.shape[1] > 1 or cu_seqlens is not None:
        return _run(inputs, precision, save=False)[0]
    beta = beta[:, 0, ..., None].astype(jnp.float32)
    v_step, erase = (beta * x[:, 0].astype(jnp.float32) for x in (v, k))
    decay = None if g is None else jnp.exp(g[:, 0].astype(jnp.float32))
    o, final = token_step(q[:, 0], k[:, 0], v_step, erase, decay, states[0])
    return o[:, None].astype(v.dtype), final[None]


def _fused_forward(q, k, v, beta, g, states, cu_seqlens, precision):
    inputs = (q, k, v, beta, g, states, cu_seqlens)
    results, saved = _run(inputs, precision, save=True)
    return results, (inputs, saved)


def _run(inputs, precision, save):
    q, k, v, beta, g, states, cu_seqlens = inputs
    (B, T, H, _), V = q.shape, v.shape[-1]
    where = _layout(k, cu_seqlens)
    operand, exact = operand_type((q, k, v), states, precision)
    q_rows, k_rows, v_rows = (by_head(x.astype(operand), where) for x in (q, k, v))
    o, final, saved = forward(
        q_rows,
        k_rows,
        v_rows,
        _gates(beta, g, where),
        states.reshape(-1, *states.shape[2:]),
        where.sequence,
        exact,
        save,
    )
    final = unless_empty(final.reshape(states.shape), states, cu_seqlens)
    o = layout.from_rows(o.reshape(B, -1, H, V), where, T)
    return (o.astype(v.dtype), final), saved


def _fused_backward(precision, residuals, gradients):
    (q, k, v, beta, g, states, cu_seqlens), saved = residuals
    d_o, d_final = gradients
    T, N = k.shape[1:3]
    where = _layout(k, cu_seqlens)
    operand, exact = operand_type((q, k, v), states, precision)
    q_rows, k_rows, d_rows = (by_head(x.astype(operand), where) for x in (q, k, d_o))
    d_q, d_k, d_v, d_states, d_gates = backward(
        q_rows,
        k_rows,
        d_rows,
        _gates(beta, g, where, at_tokens=N > 1),
        d_final.reshape(-1, *states.shape[2:]),
        saved,
        where.sequence,
        exact,
    )
    d_states = unless_empty(d_states.reshape(states.shape), d_final, cu_seqlens)
    d_g = None
    if g is not None:
        d_g = from_lane(_decay_gradient(d_gates, N), where, T, N)
        d_g = d_g[:, :, 0].astype(g.dtype)
    return (
        from_head(d_q, where, q),
        from_head(d_k, where, k),
        from_head(d_v, where, v),
        from_lane(d_gates.beta, where, T, N).astype(beta.dtype),
        d_g,
        d_states,
        None,
    )


_fused.defvjp(
    first_order_only("delta_rule", _fused_forward, (7,)),
    first_order_only("delta_rule", _fused_backward, (0,)),
)


def _decay_gradient(d: GateGradients, steps: int) -> Float[Array, "B M H KEYS"]:
    """The gradient for each log decay: the sum over the intervals that contain it.

    It is at the first key of every token; the numbers at other keys are meaningless.
    """
    assert d.within is not None and d.entry is not None
    assert d.entry_of_token is not None
    assert d.exit is not None and d.total is not None

    to_tokens = sums_from(d.entry_of_token[..., : KEYS // steps])
    to_tokens = jnp.repeat(to_tokens, steps, -1)
    unused = KEYS - to_tokens.shape[-1]
    to_tokens = jnp.pad(to_tokens, [(0, 0)] * 3 + [(0, unused)])
    crossing = d.within + sums_from(d.entry) + sums_before(d.exit) + to_tokens
    return crossing + jnp.sum(d.total, -1, keepdims=True)


def _layout(k, cu_seqlens) -> layout.Layout:
    return layout.arrange(k.shape[1], chunk_tokens(k.shape[2]), None, cu_seqlens)


def _gates(beta, g, where, at_tokens=False) -> Float[Array, "B M G H KEYS"]:
    """beta and, with a decay, its running sums hi and lo at the keys.

    With `at_tokens`, also the running sums at the tokens.
    """
    gates = [by_lane(beta, where)]
    if g is not None:  # the decay belongs to the first step of a token
        g, others = jnp.maximum(g, NEVER)[:, :, None], beta.shape[2] - 1
        g = jnp.pad(g, [(0, 0), (0, 0), (0, others), (0, 0)])
        sums = running_sum(by_lane(g, where))
        gates += sums
        if at_tokens:
            N, unused = beta.shape[2], KEYS - where.chunk_size
            tokens = [x[..., : N * where.chunk_size : N] for x in sums]
            pad = [(0, 0)] * 3 + [(0, unused)]
            gates += [jnp.pad(x, pad, mode="edge") for x in tokens]
    return jnp.stack(gates, 2)
