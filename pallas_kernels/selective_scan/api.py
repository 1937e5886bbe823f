"""The public selective scan: checks its arguments and calls an implementation."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, streams
from pallas_kernels.arguments import check_arrays, check_settings
from pallas_kernels.segments import Segments, where
from pallas_kernels.selective_scan import tpu
from pallas_kernels.selective_scan.chunked import chunked
from pallas_kernels.selective_scan.reference import token_recurrence
from pallas_kernels.tpu.tiles import LANES

NAME = "selective_scan"

# The axes of every argument, one letter per axis; equal letters are equal sizes.
AXES = {
    "x": "BTE",
    "dt": "BTE",
    "A": "EN",
    "B": "BTN",
    "C": "BTN",
    "D": "E",
    "segment_ids": "BT",
    "cu_seqlens": "Z",  # Z = S + 1
    "initial_state": "BEN",
}


def selective_scan(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, " E"] | None = None,
    *,
    initial_state: Float[Array, "B E N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cu_seqlens: Int[Array, "S+1"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T E"], Float[Array, "B E N"]]:
    """Selective state space model: N decaying sums of the inputs of each channel.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
        y_t = h_t C_t + D x_t

    where h_t is [E, N]; the exponential and the products with dt, x and D are
    elementwise, and the N states of a channel share its dt_t and x_t.

    Args:
        x: inputs [B, T, E]; float32, bfloat16 or float64, as all float arguments.
        dt: step sizes [B, T, E], >= 0; the time that passes at a token.
        A: rates [E, N], <= 0; a channel's states decay by exp(A) in a time of 1.
        B: weights of an input in each state [B, T, N].
        C: weights of each state in the output [B, T, N].
        D: weights of the inputs in the outputs [E]; None for zero.
        initial_state: [B, E, N], or [S, E, N] with `cu_seqlens`; None for zero.
        segment_ids: [B, T]; the state is zeroed where the id changes. The initial state
          belongs to the first segment. A token with id < 0 is padding: it changes no
          state, its output is 0, and ids are compared across it. NaN and infinity in a
          segment reach no other.
        cu_seqlens: [S + 1], non-decreasing from 0; sequence s is tokens cu_seqlens[s]
          to cu_seqlens[s + 1] of the only batch row and has its own state. Tokens past
          the last sequence are padding. A sequence may be empty.
        chunk_size: tokens from one stored state to the next; the backward pass
          recomputes those in between. None for a tuned default. "reference" stores
          every state.
        implementation: "pallas_tpu", "pallas_gpu", "xla", "reference", or None for the
          best that can run. On a TPU this is the kernel, by estimates, if it takes the
          arguments, for 256 tokens and more, on one device or under `jax.set_mesh`
          with axes that all divide rows and channels.

    Returns:
        y [B, T, E] in x's dtype, and the state after the last token, shaped like
        `initial_state`, float32 (float64 if an argument is float64). Everything is
        computed in the state's dtype.

    Raises:
        ValueError: the shapes do not fit each other, or a setting is out of range.
        TypeError: an array is missing, or has an unsupported dtype.
        NotImplementedError: the named implementation cannot run here.

    Gradients are reverse-mode; "reference" has forward mode too.

    Reference: Gu and Dao, Mamba, arXiv 2312.00752, eq. 2a and section 3.3.
    """
    arrays = check_arrays(
        NAME,
        AXES,
        x,
        dt,
        A,
        B,
        C,
        D,
        segment_ids,
        cu_seqlens,
        initial_state,
    )
    chunk_size, _ = check_settings(NAME, chunk_size, None)
    rows, T, E = arrays["x"].shape
    run = dispatch.select(
        NAME,
        implementation,
        {
            "pallas_tpu": dispatch.Kernel(
                tpu.fused,
                lambda: tpu.unsupported(arrays, chunk_size),
                dispatch.Work(rows, T, E // LANES),
            ),
            "pallas_gpu": "there is no GPU kernel for it yet.",
            "xla": chunked if T > 1 else token_recurrence,  # one token is no chunk
            "reference": token_recurrence,
        },
    )
    return _scan(run, chunk_size, **arrays)


@partial(jax.jit, static_argnums=(0, 1))
def _scan(
    run, chunk_size, *, x, dt, A, B, C, D, initial_state, segment_ids, cu_seqlens
):
    """Set padding to zero, mark the resets, run, add D x, and mask the outputs.

    Padding with x = dt = 0 leaves every state unchanged.
    """
    rows, T, E = x.shape
    floats = [a for a in (x, dt, A, B, C, D, initial_state) if a is not None]
    wide = any(a.dtype == jnp.float64 for a in floats)
    dtype = jnp.dtype("float64" if wide else "float32")

    tokens = {"x": x, "dt": dt, "B": B, "C": C}
    segments = kept = reset = None
    if segment_ids is not None:
        before = [] if initial_state is None else [("BEN", initial_state)]
        found = [(AXES[name], token) for name, token in tokens.items()]
        segments = Segments.of(segment_ids, found, before)
        kept, reset = segments.sound, segments.reset
        if initial_state is not None:
            initial_state = segments.state_before(initial_state, "BEN")
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.astype(jnp.int32)
        kept = streams.inside(cu_seqlens, T)
        rows = cu_seqlens.shape[0] - 1
    if kept is not None:
        x, dt, B, C = (
            where(kept, "BT", token, AXES[name], 0.0) for name, token in tokens.items()
        )

    if initial_state is None:
        initial_state = jnp.zeros((rows, *A.shape), dtype)
    axis = 0 if cu_seqlens is None else 1  # [S, B, E, N], where S or B is one
    states = streams.opaque(jnp.expand_dims(initial_state.astype(dtype), axis))
    operands = [streams.vary_like(a, floats) for a in (x, dt, A.astype(dtype), B, C)]
    states = streams.vary_like(states, floats)
    if T == 0:
        y = jnp.zeros((x.shape[0], T, E), dtype)
    else:
        y, states = run(*operands, reset, states, cu_seqlens, chunk_size)
    if D is not None:
        y += D.astype(dtype)[None, None] * x.astype(dtype)
    states = jnp.squeeze(states, axis)
    if segments is not None:
        y = segments.outputs(y, "BTE")
        states = segments.state_after(states, "BEN")
    elif kept is not None:
        y = where(kept, "BT", y, "BTE", 0.0)
    return y.astype(x.dtype), states
