"""Paged attention on a Hopper GPU: a kernel for decoding, correct for any ragged batch.

A block of four warps has one query and all its heads that share keys, as rows of one
matrix, which is padded to the 64 rows of a product. It walks over blocks of the
sequence's keys, copied page by page according to the page table, with two buffers:
while one block is processed, the next is being copied. The online softmax is in
float32, normalised once at the end.

Differs from the paper in: the caller writes new keys and values; queries of one
sequence share nothing, so a chunk of a prompt reads its keys once per query; long
sequences are not divided among blocks.

Reference: Kwon et al., PagedAttention, arXiv 2309.06180.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.gpu.tiles import product
from pallas_kernels.paged_attention import schedule
from pallas_kernels.paged_attention.limits import GPU_ROWS as ROWS
from pallas_kernels.paged_attention.operands import MASKED, Masks, Operands

KEYS = 64  # keys per block
SLOTS = 2  # blocks of keys in shared memory


def attention(
    operands: Operands, masks: Masks
) -> tuple[Float[Array, "Tq Hq D"], Float[Array, "Tq Hq"]]:
    """Attend in the kernel.

    Returns:
        The outputs and the log-sum-exps in float32.
    """
    tokens, Hq, D = operands.q.shape
    _, page, Hkv, _ = operands.k_pages.shape
    pages_per_seq = operands.page_table.shape[1]
    plan = schedule.make(
        operands.kv_lens,
        operands.cu_q_lens,
        tokens=tokens,
        block_q=1,
        page=page,
        window=masks.window,
    )
    q = schedule.fold(operands, plan, 1)
    W, _, used, _ = q.shape
    q = jnp.pad(q, ((0, 0), (0, 0), (0, ROWS - used), (0, 0)))
    stored = -(-used // 8) * 8  # rows of results, whole tiles
    part = min(page, KEYS)  # keys in one copy

    def body(q_ref, k_ref, v_ref, scale_ref, count_ref, *refs):
        (sequence_ref, last_ref, first_ref, end_ref, table_ref), refs = (
            refs[:5],
            refs[5:],
        )
        o_ref, lse_ref, q_tile, k_slots, v_slots, p_tile, o_tile, lse_tile = refs[:8]
        q_arrived, arrived = refs[8:]
        w, head = jax.lax.axis_index("items"), jax.lax.axis_index("heads")

        @pl.when(w < count_ref[0])
        def _():
            sequence, last = sequence_ref[w], last_ref[w]
            start, end = first_ref[w] * page, end_ref[w] * page
            blocks = pl.cdiv(end - start, KEYS)
            scale = scale_ref[0]

            def load(block):
                slot = jax.lax.rem(block, SLOTS)
                for i in range(KEYS // part):
                    key = start + block * KEYS + i * part
                    # Past the end, copy the last ones again: the barrier counts copies.
                    key = jnp.minimum(key, end - part)
                    column = jax.lax.div(key, page)
                    place = table_ref[sequence * pages_per_seq + column]
                    rows = pl.ds(jax.lax.rem(key, page), part)
                    for ref, slots in ((k_ref, k_slots), (v_ref, v_slots)):
                        plgpu.copy_gmem_to_smem(
                            ref.at[place, rows, head],
                            slots.at[slot, pl.ds(i * part, part)],
                            arrived.at[slot],
                        )

            def attend(block, carry):
                m, l, o = carry
                slot = jax.lax.rem(block, SLOTS)
                first = start + block * KEYS
                plgpu.barrier_wait(arrived.at[slot])
                s = product((q_tile, k_slots.at[slot].T)) * scale
                k_position = first + _iota((ROWS, KEYS), 1)
                s = jnp.where(masks.seen(last, k_position), masks.cap(s), MASKED)
                new = jnp.maximum(m, s.max(axis=1))
                p = jnp.exp(s - _to_columns(new, s.shape))
                decay = jnp.exp(m - new)
                l = decay * l + p.sum(axis=1)
                p_tile[...] = p.astype(p_tile.dtype)

                @pl.when(first + KEYS > last + 1)
                def _():  # slots never written may be NaN, and 0 * NaN is NaN
                    v = v_slots[slot]
                    written = first + _iota(v.shape, 0) <= last
                    v_slots[slot] = jnp.where(written, v, jnp.zeros_like(v))

                plgpu.commit_smem()
                o = _to_columns(decay, o.shape) * o + product(
                    (p_tile, v_slots.at[slot])
                )
                pl.when(block + SLOTS < blocks)(lambda: load(block + SLOTS))
                return new, l, o

            plgpu.copy_gmem_to_smem(q_ref.at[w, head], q_tile, q_arrived)
            for i in range(SLOTS):
                pl.when(i < blocks)(lambda i=i: load(jnp.int32(i)))
            plgpu.barrier_wait(q_arrived)
            by_row = plgpu.Layout.WGMMA.reduce(1)
            carry = (
                plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), by_row),
                plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row),
                plgpu.layout_cast(
                    jnp.zeros((ROWS, D), jnp.float32), plgpu.Layout.WGMMA
                ),
            )
            m, l, o = jax.lax.fori_loop(0, blocks, attend, carry)
            o_tile[...] = o / _to_columns(l, o.shape)
            lse_tile[...] = m + jnp.log(l)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_tile.at[pl.ds(0, stored)], o_ref.at[w, head])
            plgpu.copy_smem_to_gmem(lse_tile, lse_ref.at[w, head])
            plgpu.wait_smem_to_gmem(0)

    bfloat16 = jnp.bfloat16
    o, lse = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((W, Hkv, stored, D), jnp.float32),
            jax.ShapeDtypeStruct((W, Hkv, ROWS), jnp.float32),
        ],
        grid=(Hkv, W),  # only the last may be above 65,535
        grid_names=("heads", "items"),
        kernel_name="paged_attention",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        scratch_types=[
            plgpu.SMEM((ROWS, D), bfloat16),
            plgpu.SMEM((SLOTS, KEYS, D), bfloat16),
            plgpu.SMEM((SLOTS, KEYS, D), bfloat16),
            plgpu.SMEM((ROWS, KEYS), bfloat16),
            plgpu.SMEM((ROWS, D), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2 * KEYS // part, num_barriers=SLOTS),
        ],
    )(
        q,
        operands.k_pages,
        operands.v_pages,
        operands.scale[None],
        plan.count[None],
        plan.sequence,
        plan.last,
        plan.first_page,
        plan.end_page,
        operands.page_table.reshape(-1),
    )
    o = schedule.unfold(o[:, :, :used], plan, 1, 0.0)
    return o, schedule.unfold(lse[:, :, :used], plan, 1, -jnp.inf)


def _to_columns(x, shape):
    """Broadcast one number per row to all columns."""
    return jax.lax.broadcast_in_dim(x, shape, [0])


def _iota(shape, axis):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
