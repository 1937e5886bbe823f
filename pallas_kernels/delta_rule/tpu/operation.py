"""The delta rule's TPU kernels as one operation with a gradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import layout, partition
from pallas_kernels.delta_rule.tpu.backward import GateGradients, backward
from pallas_kernels.delta_rule.tpu.forward import forward
from pallas_kernels.delta_rule.tpu.gates import NEVER, running_sum
from pallas_kernels.delta_rule.tpu.sizes import KEYS, chunk_tokens
from pallas_kernels.delta_rule.tpu.step import token_step
from pallas_kernels.products import input_product


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
    """Run the kernels; arguments and results as in `reference.token_recurrence`.

    The outputs are in v's dtype. A single token takes a kernel of its own, in float32,
    unless its gradient is taken. Every `precision` but None and DEFAULT is taken as
    HIGHEST. What `unsupported` refuses must not come here.
    """
    del chunk_size
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
    decay = None if g is None else g[:, 0]
    o, final = token_step(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], decay, states[0])
    return o[:, None].astype(v.dtype), final[None]


def _fused_forward(q, k, v, beta, g, states, cu_seqlens, precision):
    inputs = (q, k, v, beta, g, states, cu_seqlens)
    results, saved = _run(inputs, precision, save=True)
    return results, (inputs, saved)


def _run(inputs, precision, save):
    q, k, v, beta, g, states, cu_seqlens = inputs
    (B, T, H, _), V = q.shape, v.shape[-1]
    where = _layout(k, cu_seqlens)
    operand, exact = _operand(q, k, v, states, precision)
    q_rows, k_rows, v_rows = (_by_head(x.astype(operand), where) for x in (q, k, v))
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
    final = _unless_empty(final.reshape(states.shape), states, cu_seqlens)
    o = layout.from_rows(o.reshape(B, -1, H, V), where, T)
    return (o.astype(v.dtype), final), saved


def _fused_backward(precision, residuals, gradients):
    (q, k, v, beta, g, states, cu_seqlens), saved = residuals
    d_o, d_final = gradients
    (B, T, H, _), N = q.shape, k.shape[2]
    where = _layout(k, cu_seqlens)
    operand, exact = _operand(q, k, v, states, precision)
    q_rows, k_rows, d_rows = (_by_head(x.astype(operand), where) for x in (q, k, d_o))
    d_q, d_k, d_v, d_states, d_gates = backward(
        q_rows,
        k_rows,
        d_rows,
        _gates(beta, g, where, of_tokens=N > 1),
        d_final.reshape(-1, *states.shape[2:]),
        saved,
        where.sequence,
        exact,
    )
    d_states = _unless_empty(d_states.reshape(states.shape), d_final, cu_seqlens)

    def from_head(x, like):
        """The inverse of `_by_head`."""
        x = x.reshape(B, -1, *like.shape[2:])
        return layout.from_rows(x, where, T).astype(like.dtype)

    def from_lane(x):
        """The inverse of `_by_lane`, [B, T, N, H]."""
        x = jnp.moveaxis(x[..., : N * where.chunk_size], 3, 2)
        return layout.from_rows(x.reshape(B, -1, N, H), where, T)

    d_g = None
    if g is not None:
        d_g = from_lane(_decay_gradient(d_gates, N))[:, :, 0].astype(g.dtype)
    return (
        from_head(d_q, q),
        from_head(d_k, k),
        from_head(d_v, v),
        from_lane(d_gates.beta).astype(beta.dtype),
        d_g,
        d_states,
        None,
    )


_fused.defvjp(_fused_forward, _fused_backward)


def _decay_gradient(d: GateGradients, steps: int) -> Float[Array, "B M H KEYS"]:
    """What every log decay of a chunk gets of the intervals that hold it.

    Given at the first key of every token; what stands at the others is meaningless.
    """
    assert d.within is not None and d.entry is not None
    assert d.entry_of_token is not None
    assert d.exit is not None and d.total is not None

    def pad(x, before, after):
        return jnp.pad(x, [(0, 0)] * 3 + [(before, after)])

    def from_here_on(x):
        return jnp.flip(jnp.cumsum(jnp.flip(x, -1), -1), -1)

    of_token = from_here_on(d.entry_of_token[..., : KEYS // steps])
    of_token = jnp.repeat(of_token, steps, -1)
    of_token = pad(of_token, 0, KEYS - of_token.shape[-1])
    earlier = jnp.cumsum(pad(d.exit[..., :-1], 1, 0), -1)
    crossing = d.within + from_here_on(d.entry) + earlier + of_token
    return crossing + jnp.sum(d.total, -1, keepdims=True)


def _layout(k, cu_seqlens) -> layout.Layout:
    return layout.arrange(k.shape[1], chunk_tokens(k.shape[2]), None, cu_seqlens)


def _operand(q, k, v, states, precision) -> tuple[jnp.dtype, bool]:
    """The type that is multiplied, and whether exactly."""
    inputs = input_product((q, k, v), states.dtype, precision)
    # Between one pass and all of them the kernel has no step; more is what it takes.
    return inputs.operand, inputs.precision not in (None, jax.lax.Precision.DEFAULT)


def _by_head(x, where):
    """[B, T, ..., H, D] to [B, M, keys or tokens, H D]."""
    x = layout.rows(x, where)
    return x.reshape(*x.shape[:2], -1, x.shape[-2] * x.shape[-1])


def _by_lane(x, where):
    """[B, T, N, H] to [B, M, H, KEYS]."""
    x = layout.rows(x.astype(jnp.float32), where)
    x = jnp.moveaxis(x.reshape(*x.shape[:2], -1, x.shape[-1]), 2, 3)
    return jnp.pad(x, [(0, 0)] * 3 + [(0, KEYS - x.shape[-1])])


def _gates(beta, g, where, of_tokens=False) -> Float[Array, "B M G H KEYS"]:
    """beta and, where there is a decay, its running sums at the keys, hi and lo.

    With `of_tokens` also those at the tokens.
    """
    gates = [_by_lane(beta, where)]
    if g is not None:  # the decay comes with the first step of a token
        g, others = jnp.maximum(g, NEVER)[:, :, None], beta.shape[2] - 1
        g = jnp.pad(g, [(0, 0), (0, 0), (0, others), (0, 0)])
        sums = running_sum(_by_lane(g, where))
        gates += sums
        if of_tokens:
            N, unused = beta.shape[2], KEYS - where.chunk_size
            tokens = [x[..., : N * where.chunk_size : N] for x in sums]
            pad = [(0, 0)] * 3 + [(0, unused)]
            gates += [jnp.pad(x, pad, mode="edge") for x in tokens]
    return jnp.stack(gates, 2)


def _unless_empty(found, given, cu_seqlens):
    """States [S, B, H, K, V]: no chunk writes that of an empty sequence."""
    if cu_seqlens is None:
        return found
    empty = cu_seqlens[1:] == cu_seqlens[:-1]
    return jnp.where(empty[:, None, None, None, None], given, found)
