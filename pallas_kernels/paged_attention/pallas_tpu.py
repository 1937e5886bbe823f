"""Paged attention on a TPU: one kernel for a ragged batch of any mix of requests.

The grid runs over the items of the schedule, a few queries of one sequence each. For
an item the kernel walks over blocks of its pages, copied from HBM page by page, with
two buffers: while one block is processed, the next is being copied, even if it belongs
to the next item. Only pages that the item's queries see are copied.

Query heads that share keys are rows of one matrix. A block is widened to float32 in
VMEM, whatever the pages' dtype; where a page has the heads of a token side by side, the
keys of a head are then every Hkv-th row. The online softmax is in float32, normalised
once at the end.

The pages must be row-major in HBM, or XLA copies the whole cache before each call. On a
TPU that is the default for heads of 128 and 256; for heads of 64 the cache needs
`jax.experimental.layout.Format`. Pages of 64 tokens and more make fewer, larger copies.

Differs from the paper in: the caller writes new keys and values; one kernel serves all
kinds of requests, where the paper has three.

Reference: Jiang et al., Ragged Paged Attention, arXiv 2604.15464.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.paged_attention import block_sizes, schedule
from pallas_kernels.paged_attention.operands import MASKED, Masks, Operands
from pallas_kernels.products import EXACT

LANES = 128


class Static(NamedTuple):
    """The static parameters of the kernel.

    Attributes:
        masks: the window and the soft cap.
        block_q: queries per item.
        pages: pages per block.
        page: tokens per page.
        pages_per_seq: entries of the page table per sequence.
        heads_first: whether a page is [Hkv, page, D], else [page, Hkv, D].
        scaled: whether keys, and whether values, have a scale per token and head.
    """

    masks: Masks
    block_q: int
    pages: int
    page: int
    pages_per_seq: int
    heads_first: bool
    scaled: tuple[bool, bool]


def attention(
    operands: Operands, masks: Masks
) -> tuple[Float[Array, "Tq Hq D"], Float[Array, "Tq Hq"]]:
    """Attend in the kernel.

    Returns:
        The outputs and the log-sum-exps in float32.
    """
    tokens, _, D = operands.q.shape
    _, page, Hkv, _ = operands.k_pages.shape
    block_q, pages = block_sizes.tpu(operands)
    plan = schedule.make(
        operands.kv_lens,
        operands.cu_q_lens,
        tokens=tokens,
        block_q=block_q,
        page=page,
        window=masks.window,
    )
    q = schedule.fold(operands, plan, block_q).astype(operands.product)
    W, _, used, _ = q.shape
    rows = block_sizes.tile_rows(used, q.dtype)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - used), (0, 0)))

    # XLA puts heads before tokens if the heads of one token do not fill 32 bits.
    heads_first = Hkv * operands.k_pages.dtype.itemsize < 4
    streams = [operands.k_pages, operands.v_pages]
    if heads_first:
        streams = [jnp.swapaxes(x, 1, 2) for x in streams]
    buffers = [pltpu.VMEM((2, pages, *x.shape[1:]), x.dtype) for x in streams]
    for scale in (operands.k_scale, operands.v_scale):
        if scale is not None:
            streams.append(_by_sequence(scale, operands.page_table, pages))
            buffers.append(pltpu.VMEM((2, Hkv, pages * page), jnp.float32))

    def item_block(w, count, *_):
        return jnp.minimum(w, jnp.maximum(count[0] - 1, 0)), 0, 0, 0

    prefetched = (
        plan.count[None],
        plan.sequence,
        plan.position,
        plan.last,
        plan.first_page,
        plan.end_page,
        operands.page_table.reshape(-1),
    )
    static = Static(
        masks=masks,
        block_q=block_q,
        pages=pages,
        page=page,
        pages_per_seq=operands.page_table.shape[1],
        heads_first=heads_first,
        scaled=(operands.k_scale is not None, operands.v_scale is not None),
    )
    # Strided reads of rows need matrices of at most one tile's lanes.
    lanes = min(D, LANES)
    widened = pltpu.VMEM((D // lanes, pages * page * Hkv, lanes), jnp.float32)
    o, lse = pl.pallas_call(
        partial(_kernel, static=static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(W,),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                pl.BlockSpec((None, Hkv, rows, D), item_block),
                *[pl.BlockSpec(memory_space=pl.ANY)] * len(streams),
            ],
            out_specs=[
                pl.BlockSpec((None, Hkv, rows, D), item_block),
                pl.BlockSpec((None, Hkv, 1, rows), item_block),
            ],
            scratch_shapes=[
                buffers,
                pltpu.SemaphoreType.DMA((2, len(streams))),
                pltpu.SMEM((1,), jnp.int32),
                [widened, widened],
                pltpu.VMEM((Hkv, rows, LANES), jnp.float32),
                pltpu.VMEM((Hkv, rows, LANES), jnp.float32),
                pltpu.VMEM((Hkv, rows, D), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((W, Hkv, rows, D), jnp.float32),
            jax.ShapeDtypeStruct((W, Hkv, 1, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=block_sizes.VMEM_LIMIT,
        ),
        name="paged_attention",
    )(*prefetched, operands.scale[None], q, *streams)
    o = schedule.unfold(o[:, :, :used], plan, block_q, 0.0)
    return o, schedule.unfold(lse[:, :, 0, :used], plan, block_q, -jnp.inf)


def _by_sequence(scale, page_table, pages):
    """The scales of the pages in the table, by sequence and head: [S, Hkv, tokens].

    The tokens are rounded up to whole blocks. This gathers every entry of the table,
    but only a few per cent of the pages' bytes.
    """
    S, columns = page_table.shape
    _, page, Hkv = scale.shape
    rows = scale[page_table].transpose(0, 3, 1, 2).reshape(S, Hkv, columns * page)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, -columns % pages * page)))


def _kernel(
    # Prefetched scalars.
    count,
    sequence,
    position,
    last,
    first_page,
    end_page,
    table,
    # Inputs, then outputs and scratch.
    scale,
    q,
    *refs,
    static: Static,
):
    masks, block_q, pages, page, pages_per_seq, heads_first, scaled = static
    streams = refs[: 2 + sum(scaled)]
    o, lse, buffers, semaphores, parity, widened, m, l, acc = refs[len(streams) :]
    Hkv, rows, D = q.shape
    N = pages * page
    lane_tiles = [slice(c, c + LANES) for c in range(0, D, LANES)]
    w = pl.program_id(0)
    precision = EXACT if q.dtype == jnp.float32 else None

    def in_use(item, block):
        """The range of pages of a block that the item's queries see."""
        first = jnp.maximum(first_page[item] - block * pages, 0)
        return first, jnp.minimum(end_page[item] - block * pages, pages)

    def copies(item, block, slot, act):
        """Call `act` with every copy of a block."""

        def copy_page(i, _):
            page_id = table[sequence[item] * pages_per_seq + block * pages + i]
            for n in range(2):
                target, done = buffers[n].at[slot, i], semaphores.at[slot, n]
                act(pltpu.make_async_copy(streams[n].at[page_id], target, done))

        jax.lax.fori_loop(*in_use(item, block), copy_page, None)
        tokens = pl.ds(pl.multiple_of(block * N, N), N)
        for n in range(2, len(streams)):
            source = streams[n].at[sequence[item], :, tokens]
            target, done = buffers[n].at[slot], semaphores.at[slot, n]
            act(pltpu.make_async_copy(source, target, done))

    def start(item, block, slot):
        copies(item, block, slot, lambda copy: copy.start())

    def widen(slot, i):
        """Widen a page to float32, in the order of rows that `head_rows` reads."""
        for buffer, wide in zip(buffers[:2], widened, strict=True):
            x = buffer[slot, i].astype(jnp.float32)
            if heads_first:
                parts = [(h * N + i * page, page, x[h]) for h in range(Hkv)]
            else:
                parts = [(i * page * Hkv, page * Hkv, x.reshape(page * Hkv, D))]
            for first, size, part in parts:
                place = pl.ds(pl.multiple_of(first, page), size)
                for c, lanes in enumerate(lane_tiles):
                    wide[c, place] = part[:, lanes]

    def head_rows(wide, h):
        place = pl.ds(h * N, N) if heads_first else pl.ds(h, N, stride=Hkv)
        tiles = [wide[c, place] for c in range(len(lane_tiles))]
        return jnp.concatenate(tiles, axis=-1)

    def dot(x, y, contracted):
        return jax.lax.dot_general(
            x.astype(q.dtype),
            y.astype(q.dtype),
            (contracted, ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def attend(block, slot):
        """Add a block of keys to the running softmax of every head."""
        k_position = block * N + jax.lax.broadcasted_iota(jnp.int32, (rows, N), 1)
        query = jax.lax.broadcasted_iota(jnp.int32, (rows, N), 0) & (block_q - 1)
        seen = masks.seen(jnp.minimum(position[w] + query, last[w]), k_position)
        # Rows that were not copied or never written may be NaN, and 0 * NaN is NaN.
        v_position = block * N + jax.lax.broadcasted_iota(jnp.int32, (N, D), 0)
        usable = (v_position <= last[w]) & (v_position >= first_page[w] * page)
        scales = iter(buffers[2:])
        k_scale = next(scales)[slot] if scaled[0] else None
        v_scale = next(scales)[slot] if scaled[1] else None
        if v_scale is not None:
            v_scale = jnp.where(k_position[:1] <= last[w], v_scale, 0.0)

        for h in range(Hkv):
            s = dot(q[h], head_rows(widened[0], h), ((1,), (1,))) * scale[0]
            if k_scale is not None:
                s = s * k_scale[h : h + 1]
            s = jnp.where(seen, masks.cap(s), MASKED)
            old = m[h]
            m[h] = new = jnp.maximum(old, s.max(-1, keepdims=True))
            decay = jnp.exp(old - new)
            p = jnp.exp(s - new[:, :1])
            l[h] = decay * l[h] + p.sum(-1, keepdims=True)
            if v_scale is not None:
                p = p * v_scale[h : h + 1]
            v = jnp.where(usable, head_rows(widened[1], h), 0.0)
            acc[h] = decay[:, :1] * acc[h] + dot(p, v, ((1,), (0,)))

    @pl.when((w == 0) & (count[0] > 0))
    def _first():
        parity[0] = 0
        start(0, first_page[0] // pages, 0)

    @pl.when(w < count[0])
    def _item():
        m[...] = jnp.full_like(m, MASKED)
        l[...] = jnp.zeros_like(l)
        acc[...] = jnp.zeros_like(acc)
        first, end = first_page[w] // pages, pl.cdiv(end_page[w], pages)
        before = parity[0] - first

        def step(block, _):
            slot = (before + block) % 2
            ends = block + 1 == end
            item = jnp.where(ends, w + 1, w)

            @pl.when(item < count[0])
            def _prefetch():
                next_block = jnp.where(ends, first_page[item] // pages, block + 1)
                start(item, next_block, 1 - slot)

            copies(w, block, slot, lambda copy: copy.wait())
            jax.lax.fori_loop(*in_use(w, block), lambda i, _: widen(slot, i), None)
            attend(block, slot)

        jax.lax.fori_loop(first, end, step, None)
        parity[0] = (before + end) % 2
        for h in range(Hkv):
            o[h] = acc[h] / l[h][:, :1]
            lse[h] = (m[h] + jnp.log(l[h])).T[:1]
