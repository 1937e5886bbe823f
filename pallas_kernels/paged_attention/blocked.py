"""Paged attention in plain JAX: the online softmax over blocks of pages.

A unit of work is an item (a few queries of one sequence) with a block of its pages. A
loop goes through all units in order, several in each step, so that its memory traffic
and its time depend only on the pages in use, whichever sequences they belong to.

    m' = max(m, max_j s_j),  l' = e^{m - m'} l + sum_j e^{s_j - m'}
    o' = e^{m - m'} o + sum_j e^{s_j - m'} v_j
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.paged_attention import block_sizes, schedule
from pallas_kernels.paged_attention.operands import Masks, Operands
from pallas_kernels.paged_attention.partials import finite
from pallas_kernels.products import EXACT, Product


def blocked_attention(
    operands: Operands, masks: Masks
) -> tuple[Float[Array, "Tq Hq D"], Float[Array, "Tq Hq"]]:
    """Attend block by block.

    Returns:
        The outputs and the log-sum-exps, in the accumulation type.
    """
    tokens, Hq, D = operands.q.shape
    _, page, Hkv, _ = operands.k_pages.shape
    S, pages_per_seq = operands.page_table.shape
    block_q, pages, units = block_sizes.blocked(tokens, S, Hq, page, pages_per_seq)
    N, R, dtype = pages * page, Hq // Hkv * block_q, operands.accumulation
    precision = EXACT if operands.product == dtype else None
    product = Product(operands.product, dtype, precision)

    plan = schedule.make(
        operands.kv_lens,
        operands.cu_q_lens,
        tokens=tokens,
        block_q=block_q,
        page=page,
        window=masks.window,
    )
    q_WHRD = schedule.fold(operands, plan, block_q)
    W = q_WHRD.shape[0]
    blocks = -(-(plan.end_page - plan.first_page) // pages)
    ends = jnp.cumsum(
        jnp.where(jnp.arange(W, dtype=jnp.int32) < plan.count, blocks, 0),
        dtype=jnp.int32,
    )
    row_R = jnp.arange(R, dtype=jnp.int32) % block_q

    def step(n, carry):
        unit = n * units + jnp.arange(units, dtype=jnp.int32)
        item = jnp.searchsorted(ends, jnp.minimum(unit, ends[-1] - 1), side="right")
        block = unit - (ends[item] - blocks[item])

        column = (plan.first_page[item] + block * pages)[:, None]
        column = column + jnp.arange(pages, dtype=jnp.int32)[None]
        in_use = column < plan.end_page[item][:, None]  # none past the last unit
        column = jnp.where(in_use, column, plan.first_page[item][:, None])
        page_id = operands.page_table[plan.sequence[item][:, None], column]
        k_position = (
            column[:, :, None] * page + jnp.arange(page, dtype=jnp.int32)[None, None]
        )
        k_position = k_position.reshape(units, 1, N)
        q_position = plan.position[item][:, None] + row_R[None]
        q_position = jnp.minimum(q_position, plan.last[item][:, None])[:, :, None]
        in_use = jnp.repeat(in_use, page, axis=1)[:, None]
        seen = in_use & masks.seen(q_position, k_position)  # [units, R, N]
        written = k_position <= plan.last[item][:, None, None]

        def gather(x):
            return x[page_id].reshape(units, N, *x.shape[2:])

        def scales(x):
            return jnp.swapaxes(gather(x), 1, 2)[:, :, None]

        s = product("chrd,cnhd->chrn", q_WHRD[item], gather(operands.k_pages))
        s = s * operands.scale
        if operands.k_scale is not None:
            s = s * scales(operands.k_scale)
        s = jnp.where(seen[:, None], masks.cap(s), -jnp.inf)

        # The units of an item are neighbours, so a step touches at most `units` items.
        first = item[0]
        member = item - first
        old_m, old_l, old_o = (
            jax.lax.dynamic_slice_in_dim(x, first, units) for x in carry
        )

        def total(x):
            return jax.ops.segment_sum(x, member, units, indices_are_sorted=True)

        m = jax.ops.segment_max(s.max(-1), member, units, indices_are_sorted=True)
        m = jnp.maximum(old_m, m)
        p = jnp.exp(s - finite(m)[member][..., None])
        decay = jnp.exp(old_m - finite(m))
        l = decay * old_l + total(p.sum(-1))
        if operands.v_scale is not None:
            p = jnp.where(seen[:, None], p * scales(operands.v_scale), 0.0)
        v = gather(operands.v_pages)
        v = jnp.where(written.reshape(units, N, 1, 1), v, 0)  # 0 * NaN is NaN
        o = decay[..., None] * old_o + total(product("chrn,cnhd->chrd", p, v))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, new, first, 0)
            for x, new in zip(carry, (m, l, o), strict=True)
        )

    rows = (W + units, Hkv, R)
    carry = (
        jnp.full(rows, -jnp.inf, dtype),
        jnp.zeros(rows, dtype),
        jnp.zeros((*rows, D), dtype),
    )
    m, l, o = jax.lax.fori_loop(0, -(-ends[-1] // units), step, carry)
    o = o / jnp.where(l > 0, l, 1.0)[..., None]
    o = schedule.unfold(o[:W], plan, block_q, 0.0)
    return o, schedule.unfold((m + jnp.log(l))[:W], plan, block_q, -jnp.inf)
