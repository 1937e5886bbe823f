"""The public delta rule: checks its arguments and calls an implementation."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, streams
from pallas_kernels.arguments import check_arrays, check_scale, check_settings
from pallas_kernels.delta_rule import gpu, tpu
from pallas_kernels.delta_rule.chunked import chunked
from pallas_kernels.delta_rule.reference import token_recurrence

# The axes of every argument, one letter per axis; equal letters are equal sizes.
AXES = {
    "q": "BTHK",
    "k": "BTNHK",
    "v": "BTNHV",
    "beta": "BTNH",
    "g": "BTH",
    "segment_ids": "BT",
    "cu_seqlens": "Z",  # Z = S + 1
    "initial_state": "BHKV",
}
ONE_STEP_AXES = AXES | {"k": "BTHK", "v": "BTHV", "beta": "BTH"}


def delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    g: Float[Array, "B T H"] | None = None,
    *,
    scale: ArrayLike | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cu_seqlens: Int[Array, "S+1"] | None = None,
    chunk_size: int | None = None,
    precision: jax.lax.Precision | str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Gated delta rule: a decaying state in which each key's value is overwritten.

        S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
        o_t = scale S_t^T q_t

    This is `delta_product` with one step per token.

    Args:
        q: queries [B, T, H, K]; float32, bfloat16 or float64, as all float arguments.
        k: keys [B, T, H, K], used as given; unit keys keep the state bounded.
        v: values [B, T, H, V].
        beta: step sizes [B, T, H], between 0 and 2 for unit keys.
        g: natural logarithm of the decay [B, T, H], <= 0; None for no decay.
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
          HIGHEST for float32, which beta up to 2 needs; bfloat16 operands are
          multiplied as they are and accumulated in float32. Triangular systems, decays
          and states are at least float32.
        implementation: "pallas_tpu", "pallas_gpu", "xla", "reference", or None for the
          best that can run. On a TPU this is the kernel, by estimates, if it takes the
          arguments, for 256 tokens and more, on one device or under `jax.set_mesh`
          with axes that all divide rows and heads. In float32 its error may be twice
          that of "xla". The GPU kernel, for bfloat16 on Hopper, is not measured yet and
          runs only if it is named.

    Returns:
        o [B, T, H, V] in v's dtype, and the state after the last token, shaped like
        `initial_state`, float32 (float64 if an argument is float64).

    Raises:
        ValueError: the shapes do not fit each other, or a setting is out of range.
        TypeError: an array is missing, or has an unsupported dtype.
        NotImplementedError: the named implementation cannot run here.

    Gradients are reverse-mode, of first order for a TPU kernel; "reference" has forward
    mode too.

    Reference: Yang et al., Gated Delta Networks, arXiv 2412.06464.
    """
    arrays = check_arrays(
        "delta_rule",
        ONE_STEP_AXES,
        q,
        k,
        v,
        beta,
        g,
        segment_ids,
        cu_seqlens,
        initial_state,
    )
    for name in ("k", "v", "beta"):
        arrays[name] = jnp.expand_dims(arrays[name], 2)
    settings = check_settings("delta_rule", chunk_size, precision)
    check_scale("delta_rule", "scale", scale)
    run = select("delta_rule", implementation, arrays, settings[0])
    return streams.run(run, tuple(AXES.items()), *settings, scale, **arrays)


def delta_product(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T N H K"],
    v: Float[Array, "B T N H V"],
    beta: Float[Array, "B T N H"],
    g: Float[Array, "B T H"] | None = None,
    *,
    scale: ArrayLike | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cu_seqlens: Int[Array, "S+1"] | None = None,
    chunk_size: int | None = None,
    precision: jax.lax.Precision | str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Gated delta rule with N steps per token: a product of N Householder-like factors.

        S <- e^{g_t} S_{t-1}
        S <- (I - beta_tn k_tn k_tn^T) S + beta_tn k_tn v_tn^T      for n = 1 .. N
        S_t = S,   o_t = scale S_t^T q_t

    Args:
        q: queries [B, T, H, K], one per token.
        k: keys [B, T, N, H, K].
        v: values [B, T, N, H, V].
        beta: step sizes [B, T, N, H].
        g: natural logarithm of the decay [B, T, H], <= 0, applied before the first
          step; None for no decay.
        scale, initial_state, segment_ids, cu_seqlens, chunk_size, precision,
          implementation: as in `delta_rule`.

    Returns:
        The outputs [B, T, H, V] and the final state, as from `delta_rule`.

    Raises:
        The same errors as `delta_rule`.

    Reference: Siems et al., DeltaProduct, arXiv 2502.10297.
    """
    arrays = check_arrays(
        "delta_product",
        AXES,
        q,
        k,
        v,
        beta,
        g,
        segment_ids,
        cu_seqlens,
        initial_state,
    )
    settings = check_settings("delta_product", chunk_size, precision)
    check_scale("delta_product", "scale", scale)
    run = select("delta_product", implementation, arrays, settings[0])
    return streams.run(run, tuple(AXES.items()), *settings, scale, **arrays)


def select(operation: str, implementation: str | None, arrays, chunk_size: int | None):
    """The function of a named implementation; see `dispatch.select`."""
    B, T, H, _ = arrays["q"].shape

    def kernel(module):
        def misfit():
            return module.unsupported(arrays, chunk_size)

        return dispatch.Kernel(module.fused, misfit, dispatch.Work(B, T, H))

    return dispatch.select(
        operation,
        implementation,
        {
            "pallas_tpu": kernel(tpu),
            "pallas_gpu": kernel(gpu),
            "xla": chunked if T > 1 else token_recurrence,  # one token is no chunk
            "reference": token_recurrence,
        },
    )
