"""Block sizes of paged attention, and the memory limits of its TPU kernel."""

import jax.numpy as jnp

from pallas_kernels.layout import round_up_to_power_of_two
from pallas_kernels.paged_attention.operands import Operands
from pallas_kernels.platform import platform


def queries(tokens: int, sequences: int, limit: int) -> int:
    """The number of queries in an item, a power of two.

    About as many as a sequence has, so that decoding wastes no rows and a chunk of a
    prompt reads its keys only a few times.
    """
    mean = round_up_to_power_of_two(max(-(-tokens // sequences), 1))
    return min(mean, round_up_to_power_of_two(max(limit, 1)))


def blocked(
    tokens: int, sequences: int, heads: int, page: int, pages_per_seq: int
) -> tuple[int, int, int]:
    """Sizes in plain JAX: queries per item, pages per block, units per step.

    A block has about 128 keys. A step has up to 2^20 scores, to occupy many cores; a
    CPU is fastest with as many as stay in its cache.
    """
    block_q = queries(tokens, sequences, 64)
    pages = min(max(128 // page, 1), pages_per_seq)
    scores = heads * block_q * pages * page
    most = 2 if platform() == "cpu" else sequences * -(-pages_per_seq // pages)
    return block_q, pages, max(1, min(2**20 // scores, most))


VMEM_LIMIT = 48 * 2**20
"""Bytes of VMEM the kernel asks for; the smallest chip (tpu7x) has 64 MiB per core."""
VMEM_BUDGET = 32 * 2**20
"""Bytes of these for blocks; the rest is left to the compiler."""
SMEM_BUDGET = 960 * 2**10
"""Bytes of scalar memory for the page table and the schedule, of 1 MiB per core."""


def tile_rows(rows: int, dtype) -> int:
    """Rows of a matrix, rounded up to whole tiles of 8 times 32 bits."""
    tile = 32 // jnp.dtype(dtype).itemsize
    return -(-rows // tile) * tile


def tpu(operands: Operands) -> tuple[int, int]:
    """Sizes of the TPU kernel: queries per item, pages per block.

    A block has 512 keys and an item up to 512 rows, or fewer if VMEM is too small.
    """
    (tokens, Hq, _), page = operands.q.shape, operands.k_pages.shape[1]
    S, Hkv = operands.page_table.shape[0], operands.k_pages.shape[2]
    block_q, block = queries(tokens, S, 512 * Hkv // Hq), 512
    while vmem_bytes(operands, block_q, block) > VMEM_BUDGET:
        if block > 128 and block > page:
            block //= 2
        elif block_q > 1:
            block_q //= 2
        else:
            break
    return block_q, max(block // page, 1)


def vmem_bytes(
    operands: Operands, block_q: int, block: int, heads: int | None = None
) -> int:
    """Bytes of VMEM for the kernel's buffers, with `block` keys per block.

    Arrays are padded to tiles of 128 lanes, and copied arrays have two buffers.

    Args:
        heads: the number of heads of keys; None for that of the operands.
    """
    (_, Hq, D), pages = operands.q.shape, operands.k_pages.dtype
    group = Hq // operands.k_pages.shape[2]
    Hkv = operands.k_pages.shape[2] if heads is None else heads
    lanes, product = -(-D // 128) * 128, jnp.dtype(operands.product)
    rows = tile_rows(group * block_q, product)
    # Keys and values as copied, and in float32.
    keys = 2 * block * Hkv * lanes * (2 * pages.itemsize + 4)
    queries_and_results = 2 * Hkv * rows * lanes * (product.itemsize + 4)
    accumulators = Hkv * rows * (2 * 128 + lanes) * 4
    scores = 4 * rows * block * 4
    return keys + queries_and_results + accumulators + scores
