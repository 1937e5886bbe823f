"""The public paged attention: checks its arguments and calls an implementation."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, partition
from pallas_kernels.derivatives import not_differentiable
from pallas_kernels.paged_attention import pallas_gpu, pallas_tpu
from pallas_kernels.paged_attention.blocked import blocked_attention
from pallas_kernels.paged_attention.checks import NAME, check_arrays, check_settings
from pallas_kernels.paged_attention.limits import gpu_misfit, misfit
from pallas_kernels.paged_attention.operands import (
    AXES,
    Masks,
    Operands,
    accumulation,
)
from pallas_kernels.paged_attention.reference import token_attention


def paged_attention(
    q: Float[Array, "Tq Hq D"],
    k_pages: Array,
    v_pages: Array,
    page_table: Int[Array, "S pages_per_seq"],
    kv_lens: Int[Array, "S"],
    cu_q_lens: Int[Array, "S+1"],
    *,
    scale: ArrayLike | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    return_log_sum_exp: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    """Causal attention of new tokens to the paged keys and values of their sequences.

        s_j = soft_cap tanh(scale q . k_j / soft_cap)
        o = sum_j softmax(s)_j v_j

    over the positions j that the query sees: j <= p, and j > p - window. Query i of a
    sequence has position p = kv_len - q_len + i, so one call can mix decoding (q_len
    1), chunks of prompts (any q_len) and the verification of drafted tokens. The keys
    and values of the new tokens must already be in the pages.

    Args:
        q: queries [Tq, Hq, D], one sequence after another; float32, bfloat16 or
          float64.
        k_pages, v_pages: [P, page, Hkv, D] in those dtypes or quantised (int8,
          float8_e4m3fn, float8_e5m2). Hq / Hkv query heads share a head of keys.
        page_table: [S, pages_per_seq]; the pages of each sequence in order. Entries
          past a sequence's length may be anything, and so may pages, and slots of a
          page, that no sequence has reached.
        kv_lens: [S], the number of keys of each sequence, including the new tokens; at
          most pages_per_seq * page.
        cu_q_lens: [S + 1], non-decreasing from 0: sequence s has the queries
          cu_q_lens[s] to cu_q_lens[s + 1]. A sequence may have none.
        scale: factor of the scores; None for D**-0.5.
        window: the number of keys that a query sees, including its own; None for all.
        soft_cap: bounds the scores, after the scale and before the mask; None for none.
        k_scale, v_scale: factors of quantised pages' values: one number, or one for
          each token and head [P, page, Hkv]. int8 needs both; None for 1 in float8.
        return_log_sum_exp: whether to return the log-sum-exps too.
        implementation: "pallas_tpu", "pallas_gpu", "xla", "reference", or None for the
          best that can run. A kernel runs only if it is named, since none is measured
          yet; the GPU's takes bfloat16 on Hopper and is meant for decoding. Under
          `jax.set_mesh` the mesh axis `tensor` divides the heads.

    Returns:
        o [Tq, Hq, D] in q's dtype. With `return_log_sum_exp`, also log sum_j e^{s_j}
        [Tq, Hq] in float32 (float64 for float64 queries), for `merge_partials`. Queries
        that see no key, and rows past the last sequence, have 0 and -inf.

    Raises:
        ValueError: the shapes do not fit each other, int8 pages have no scales, or a
          setting is out of range; also lengths or page numbers, if they are known
          before the program runs.
        TypeError: an array is missing, or has an unsupported dtype.
        NotImplementedError: the named implementation cannot run here, or the gradient
          of an implementation other than "reference" is needed.

    Reference: Kwon et al., PagedAttention, arXiv 2309.06180.
    """
    arrays = check_arrays(
        q=q,
        k_pages=k_pages,
        v_pages=v_pages,
        page_table=page_table,
        kv_lens=kv_lens,
        cu_q_lens=cu_q_lens,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    check_settings(scale, window, soft_cap, return_log_sum_exp)
    masks = Masks(window, soft_cap)
    operands, v_factor = _operands(arrays, scale)
    Tq, Hq, _ = operands.q.shape
    work = dispatch.Work(1, Tq, Hq)
    run = dispatch.select(
        NAME,
        implementation,
        {
            "pallas_tpu": dispatch.Kernel(
                without_gradient(by_heads(pallas_tpu.attention)),
                lambda: misfit(operands),
                work,
            ),
            "pallas_gpu": dispatch.Kernel(
                without_gradient(by_heads(pallas_gpu.attention)),
                lambda: gpu_misfit(operands),
                work,
            ),
            "xla": without_gradient(blocked_attention),
            "reference": token_attention,
        },
    )
    if operands.q.shape[0] == 0:
        o = operands.q.astype(operands.accumulation)
        lse = o[:, :, 0]
    else:
        o, lse = run(operands, masks)
    o = (o * v_factor).astype(operands.q.dtype)
    return (o, lse) if return_log_sum_exp else o


def by_heads(kernel: Callable) -> Callable:
    """`kernel`; under a mesh, on every device's share of the heads."""

    def run(operands, masks):
        def on_device(*arrays):
            return kernel(Operands(*arrays), masks)

        return partition.divided(on_device, AXES, ("QHD", "QH"))(*operands)

    return run


def without_gradient(run: Callable) -> Callable:
    """`run`, which raises NotImplementedError when it is differentiated."""
    sentence = (
        f"{NAME} is for inference and has no gradient; differentiate "
        "implementation='reference', or attention without pages."
    )
    return not_differentiable(run, sentence, static=(1,))


def _operands(arrays, scale) -> tuple[Operands, Array]:
    """The operands of every implementation, and the factor of their result.

    A scale that is one number is applied to the scores or to the result.
    """
    q, k_pages = arrays["q"], arrays["k_pages"]
    dtype = accumulation(q.dtype)
    scale = jnp.asarray(q.shape[-1] ** -0.5 if scale is None else scale, dtype)
    by_token, factor = {}, {}
    for name in ("k_scale", "v_scale"):
        array = jnp.ones((), dtype) if arrays[name] is None else arrays[name]
        array = array.astype(dtype)
        by_token[name] = array if array.ndim else None
        factor[name] = jnp.ones((), dtype) if array.ndim else array
    P, page = k_pages.shape[:2]
    room = arrays["page_table"].shape[1] * page
    operands = Operands(
        q=q,
        k_pages=k_pages,
        v_pages=arrays["v_pages"],
        page_table=jnp.clip(arrays["page_table"].astype(jnp.int32), 0, P - 1),
        kv_lens=jnp.clip(arrays["kv_lens"].astype(jnp.int32), 0, room),
        cu_q_lens=jnp.clip(arrays["cu_q_lens"].astype(jnp.int32), 0, q.shape[0]),
        **by_token,
        scale=scale * factor["k_scale"],
    )
    return operands, factor["v_scale"]
