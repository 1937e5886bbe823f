"""The public gated linear attention: checks arguments and calls an implementation."""

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, streams
from pallas_kernels.arguments import (
    as_array,
    check_arrays,
    check_scale,
    check_settings,
)
from pallas_kernels.linear_attention import tpu
from pallas_kernels.linear_attention.chunked import chunked
from pallas_kernels.linear_attention.reference import token_recurrence

NAME = "gated_linear_attention"

# The axes of every argument, one letter per axis; equal letters are equal sizes.
AXES = {
    "q": "BTHK",
    "k": "BTHK",
    "v": "BTHV",
    "g": "BTH",
    "segment_ids": "BT",
    "cu_seqlens": "Z",  # Z = S + 1
    "initial_state": "BHKV",
}
CHANNEL_AXES = AXES | {"g": "BTHK"}


def gated_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    *,
    scale: ArrayLike | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cu_seqlens: Int[Array, "S+1"] | None = None,
    chunk_size: int | None = None,
    precision: jax.lax.Precision | str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Gated linear attention: a decaying state to which each key adds its value.

        S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T
        o_t = scale S_t^T q_t

    Args:
        q: queries [B, T, H, K]; float32, bfloat16 or float64, as all float arguments.
        k: keys [B, T, H, K].
        v: values [B, T, H, V].
        g: natural logarithm of the decay, <= 0: [B, T, H] for a head's whole state
          (RetNet, Mamba-2), or [B, T, H, K] for each of its channels (GLA); None for
          no decay. -inf resets the state exactly; g > 0 is undefined.
        scale: factor of the output; None for K**-0.5.
        initial_state: [B, H, K, V], or [S, H, K, V] with `cu_seqlens`; None for zero.
        segment_ids: [B, T]; the state is zeroed where the id changes. The initial state
          belongs to the first segment. A token with id < 0 is padding: it changes no
          state, its output is 0, and ids are compared across it. NaN and infinity in a
          segment reach no other.
        cu_seqlens: [S + 1], non-decreasing from 0; sequence s is tokens cu_seqlens[s]
          to cu_seqlens[s + 1] of the only batch row and has its own state. Tokens past
          the last sequence are padding. A sequence may be empty.
        chunk_size: tokens computed together, rounded up to a power of two; None for a
          tuned default. "reference" has no chunks.
        precision: of the matrix products, a `jax.lax.Precision` or its name. None takes
          HIGHEST for float32; bfloat16 operands are multiplied as they are and
          accumulated in float32. Decays and states are at least float32.
        implementation: "pallas_tpu", "pallas_gpu", "xla", "reference", or None for the
          best that can run. On a TPU this is the kernel, by estimates, if it takes the
          arguments, for 256 tokens and more, on one device or under `jax.set_mesh`
          with axes that all divide rows and heads.

    Returns:
        o [B, T, H, V] in v's dtype, and the state after the last token, shaped like
        `initial_state`, float32 (float64 where an argument is float64).

    Raises:
        ValueError: the shapes do not fit each other, or a setting is out of range.
        TypeError: an array is missing, or has an unsupported dtype.
        NotImplementedError: the named implementation cannot run here.

    Gradients are reverse-mode; "reference" has forward mode too.

    Reference: Yang et al., Gated Linear Attention Transformers, arXiv 2312.06635.
    """
    g = None if g is None else as_array(NAME, "g", g)
    shape = () if g is None else g.shape
    if g is not None and len(shape) not in (3, 4):
        raise ValueError(
            f"{NAME}: g has shape {shape}, but it must be [B, T, H], a decay per head, "
            "or [B, T, H, K], a decay per channel."
        )
    axes = CHANNEL_AXES if len(shape) == 4 else AXES
    arrays = check_arrays(
        NAME,
        axes,
        q,
        k,
        v,
        g,
        segment_ids,
        cu_seqlens,
        initial_state,
    )
    settings = check_settings(NAME, chunk_size, precision)
    check_scale(NAME, "scale", scale)
    B, T, H, _ = arrays["q"].shape
    run = dispatch.select(
        NAME,
        implementation,
        {
            "pallas_tpu": dispatch.Kernel(
                tpu.fused,
                lambda: tpu.unsupported(arrays, chunk_size),
                dispatch.Work(B, T, H),
            ),
            "pallas_gpu": "there is no GPU kernel for it yet.",
            "xla": chunked if T > 1 else token_recurrence,  # one token is no chunk
            "reference": token_recurrence,
        },
    )
    return streams.run(run, tuple(axes.items()), *settings, scale, **arrays)
