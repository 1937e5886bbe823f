"""Paged attention token by token: the definition.

    s_j = cap(scale q . k_j)   for the keys j of the token's sequence that it sees
    o = sum_j softmax(s)_j v_j

Every page of the token's sequence is gathered. Everything is computed in the
accumulation type (float32, or float64 for float64 queries).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.paged_attention.operands import Masks, Operands
from pallas_kernels.paged_attention.partials import finite
from pallas_kernels.products import EXACT


def token_attention(
    operands: Operands, masks: Masks
) -> tuple[Float[Array, "Tq Hq D"], Float[Array, "Tq Hq"]]:
    """Attend with one query after another.

    Returns:
        The outputs and the log-sum-exps, in the accumulation type.
    """
    (Tq, Hq, D), dtype = operands.q.shape, operands.accumulation
    _, page, Hkv, _ = operands.k_pages.shape
    S, pages = operands.page_table.shape
    position_N = jnp.arange(pages * page, dtype=jnp.int32)

    def attend(token):
        t, q_HD = token
        s = jnp.searchsorted(operands.cu_q_lens, t, side="right") - 1
        in_sequence = (s >= 0) & (s < S)
        s = jnp.clip(s, 0, S - 1)
        length = operands.kv_lens[s]
        q_position = length - (operands.cu_q_lens[s + 1] - t)

        seen_N = masks.seen(q_position, position_N) & in_sequence

        def gather(pages, scales):
            x_NHD = pages[operands.page_table[s]].reshape(-1, Hkv, D).astype(dtype)
            if scales is not None:
                x_NHD = x_NHD * scales[operands.page_table[s]].reshape(-1, Hkv, 1)
            return jnp.where(seen_N[:, None, None], x_NHD, 0.0)  # 0 * NaN is NaN

        k_NHD = gather(operands.k_pages, operands.k_scale)
        v_NHD = gather(operands.v_pages, operands.v_scale)
        q_HGD = q_HD.reshape(Hkv, Hq // Hkv, D).astype(dtype)
        s_HGN = jnp.einsum("hgd,nhd->hgn", q_HGD, k_NHD, precision=EXACT)
        s_HGN = masks.cap(s_HGN * operands.scale)
        s_HGN = jnp.where(seen_N[None, None], s_HGN, -jnp.inf)
        largest = finite(s_HGN.max(-1))
        p_HGN = jnp.exp(s_HGN - largest[..., None])
        total = p_HGN.sum(-1)
        divisor = jnp.where(total > 0, total, 1.0)
        o_HGD = jnp.einsum("hgn,nhd->hgd", p_HGN, v_NHD, precision=EXACT)
        o_HGD = o_HGD / divisor[..., None]
        lse_HG = jnp.where(total > 0, largest + jnp.log(divisor), -jnp.inf)
        return o_HGD.reshape(Hq, D), lse_HG.reshape(Hq)

    return jax.lax.map(attend, (jnp.arange(Tq, dtype=jnp.int32), operands.q))
