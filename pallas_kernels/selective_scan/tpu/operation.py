"""The TPU kernels of the selective scan as one operation with a gradient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import layout, partition
from pallas_kernels.derivatives import first_order_only
from pallas_kernels.selective_scan.reference import token_recurrence
from pallas_kernels.selective_scan.tpu.backward import backward
from pallas_kernels.selective_scan.tpu.forward import LN_2, forward
from pallas_kernels.selective_scan.tpu.sizes import CHUNK
from pallas_kernels.tpu.arrange import (
    by_head,
    from_head,
    from_transposed,
    transposed_states,
    unless_empty,
)
from pallas_kernels.tpu.tiles import LANES, SUBLANES


def fused(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    reset: Bool[Array, "B T"] | None,
    states: Float[Array, "S B E N"],
    cu_seqlens: Int[Array, "S+1"] | None,
    chunk_size: int | None,
) -> tuple[Float[Array, "B T E"], Float[Array, "S B E N"]]:
    """Run the kernels; arguments and results as in `reference.token_recurrence`.

    The caller checks the arguments with `unsupported`.
    """
    if x.shape[1] == 1 and cu_seqlens is None:
        # A kernel gains nothing without a next token to keep the state for.
        return token_recurrence(x, dt, A, B, C, reset, states, None, chunk_size)
    run = partition.divided(
        _fused,
        ("BTHL", "BTHL", "HLN", "BTN", "BTN", "BT", "SBHLN", "S"),
        ("BTHL", "SBHLN"),
    )
    x_groups, dt_groups = (a.reshape(*a.shape[:2], -1, LANES) for a in (x, dt))
    A_groups, states_groups = (
        a.reshape(*a.shape[:-2], -1, LANES, a.shape[-1]) for a in (A, states)
    )
    y, final = run(
        x_groups,
        dt_groups,
        A_groups,
        B,
        C,
        reset,
        states_groups,
        cu_seqlens,
    )
    return y.reshape(x.shape), final.reshape(states.shape)


@jax.custom_vjp
def _fused(
    x: Float[Array, "B T G LANES"],
    dt: Float[Array, "B T G LANES"],
    A: Float[Array, "G LANES N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    reset: Bool[Array, "B T"] | None,
    states: Float[Array, "S B G LANES N"],
    cu_seqlens: Int[Array, "S+1"] | None,
) -> tuple[Float[Array, "B T G LANES"], Float[Array, "S B G LANES N"]]:
    """Run the kernels on G groups of channels, which a mesh may divide."""
    return _run((x, dt, A, B, C, reset, states, cu_seqlens), save=False)[0]


def _fused_forward(*inputs):
    results, before = _run(inputs, save=True)
    return results, (inputs, before)


def _run(inputs, save):
    x, dt, A, B, C, reset, states, cu_seqlens = inputs
    where = layout.arrange(x.shape[1], CHUNK, None, cu_seqlens)
    y, final, before = forward(
        by_head(x, where),
        by_head(dt.astype(jnp.float32), where),
        _columns(B, C, reset, where),
        _rates(A),
        transposed_states(states),
        where.sequence,
        reset is not None,
        save,
    )
    final = unless_empty(from_transposed(final, states), states, cu_seqlens)
    y = from_head(y, where, jax.ShapeDtypeStruct(x.shape, y.dtype))
    return (y, final), before


def _fused_backward(residuals, gradients):
    (x, dt, A, B, C, reset, states, cu_seqlens), before = residuals
    d_y, d_final = gradients
    rows, T, N = *B.shape[:2], A.shape[-1]
    where = layout.arrange(T, CHUNK, None, cu_seqlens)
    d_x, d_dt, sums, d_A, d_states = backward(
        by_head(x, where),
        by_head(dt.astype(jnp.float32), where),
        by_head(d_y, where),
        _columns(B, C, reset, where),
        _rates(A),
        before,
        transposed_states(d_final),
        where.sequence,
        reset is not None,
    )
    d_B, d_C = (
        layout.from_rows(jnp.sum(sums[:, :, :, i], 2).reshape(rows, -1, N), where, T)
        for i in range(2)
    )
    d_states = from_transposed(d_states, states)
    return (
        from_head(d_x, where, x),
        from_head(d_dt, where, dt),
        from_transposed(jnp.sum(d_A, (0, 1)), A).astype(A.dtype),
        d_B.astype(B.dtype),
        d_C.astype(C.dtype),
        None,
        unless_empty(d_states, d_final, cu_seqlens),
        None,
    )


_fused.defvjp(
    first_order_only("selective_scan", _fused_forward),
    first_order_only("selective_scan", _fused_backward),
)


def _columns(B, C, reset, where) -> Float[Array, "B M rows C"]:
    """B, C and the resets in the form that `Columns` reads."""
    columns = [layout.rows(a.astype(jnp.float32), where) for a in (B, C)]
    if reset is not None:
        # Rows without a token have reset 0, and so keep the state.
        keep = 1.0 - layout.rows(reset[..., None].astype(jnp.float32), where)
        columns.append(jnp.broadcast_to(keep, (*keep.shape[:3], SUBLANES)))
    return jnp.swapaxes(jnp.concatenate(columns, -1), -1, -2)


def _rates(A):
    """[G, LANES, N] to [G, N, LANES], divided by ln 2."""
    return jnp.swapaxes(A, -1, -2) / LN_2
