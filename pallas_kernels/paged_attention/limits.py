"""Reasons why a kernel cannot serve a call, as sentences; None if it can."""

import jax

from pallas_kernels import partition
from pallas_kernels.paged_attention import block_sizes
from pallas_kernels.paged_attention.operands import AXES, Operands

HEAD_SIZES = (64, 128, 256)
PAGES = (16, 32, 64, 128, 256)
GPU_HEAD_SIZES = (64, 128)
GPU_ROWS = 64  # query heads that share keys


def misfit(operands: Operands) -> str | None:
    """Why the TPU kernel cannot take these sizes and types, or None."""
    operands = _of_device(operands)
    _, page, Hkv, _ = operands.k_pages.shape
    if sizes := _sizes_misfit(operands, HEAD_SIZES):
        return sizes
    for name, dtype in (("q", operands.q.dtype), ("k_pages", operands.k_pages.dtype)):
        if dtype == "float64":
            return (
                f"{name} has dtype float64, which a TPU does not have; cast it to "
                "float32."
            )
    block_q, pages = block_sizes.tpu(operands)

    def vmem(heads):
        return block_sizes.vmem_bytes(operands, block_q, pages * page, heads)

    if vmem(Hkv) > block_sizes.VMEM_BUDGET:
        fits = (h for h in range(Hkv, 0, -1) if vmem(h) <= block_sizes.VMEM_BUDGET)
        return (
            f"a block of {pages * page} tokens with {Hkv} heads of keys takes "
            f"{vmem(Hkv)} bytes of VMEM where it has {block_sizes.VMEM_BUDGET}; shard "
            f"the heads, at most {next(fits, 0)} a device, or use smaller pages."
        )
    return _table_misfit(operands, block_q)


def gpu_misfit(operands: Operands) -> str | None:
    """Why the GPU kernel cannot take these sizes and types, or None."""
    if sizes := _sizes_misfit(operands, GPU_HEAD_SIZES):
        return sizes
    group = operands.q.shape[1] // operands.k_pages.shape[2]
    if group > GPU_ROWS:
        return (
            f"{group} query heads share keys, but the kernel is for at most "
            f"{GPU_ROWS}; pass implementation='xla'."
        )
    for name, dtype in (("q", operands.q.dtype), ("k_pages", operands.k_pages.dtype)):
        if dtype != "bfloat16":
            return (
                f"{name} has dtype {dtype}, but the kernel is for bfloat16; cast "
                "queries and pages, or pass implementation='xla'."
            )
    return None


def _of_device(operands: Operands) -> Operands:
    """The operands' shapes with a device's share of the heads; see `partition`."""
    Hkv = operands.k_pages.shape[2]
    parts = Hkv // partition.part("H", Hkv)

    def on_device(x, axes):
        if x is None:
            return None
        sizes = (
            size // parts if letter == "H" else size
            for letter, size in zip(axes, x.shape, strict=True)
        )
        return jax.ShapeDtypeStruct(tuple(sizes), x.dtype)

    return Operands._make(map(on_device, operands, AXES))


def _sizes_misfit(operands: Operands, head_sizes: tuple[int, ...]) -> str | None:
    D, page = operands.q.shape[-1], operands.k_pages.shape[1]
    if D not in head_sizes:
        nearest = next((size for size in head_sizes if size > D), head_sizes[-1])
        return (
            f"heads have size {D}, but the kernel is for {_listed(head_sizes)}; "
            f"{nearest} is the nearest, and smaller heads can be padded with zeros."
        )
    if page not in PAGES:
        nearest = min(PAGES, key=lambda size: abs(size - page))
        return (
            f"a page has {page} tokens, but the kernel is for {_listed(PAGES)}; "
            f"{nearest} is the nearest."
        )
    return None


def _table_misfit(operands: Operands, block_q: int) -> str | None:
    tokens, page = operands.q.shape[0], operands.k_pages.shape[1]
    S, columns = operands.page_table.shape
    schedule = 4 * 6 * (tokens // block_q + S)
    room, table = block_sizes.SMEM_BUDGET - schedule, 4 * S * columns
    if table <= room:
        return None
    wider = next((p for p in PAGES if p > page and table * page <= p * room), None)
    larger_pages = f"pages of {wider} tokens or " if wider else ""
    fewer = max(room // (4 * columns), 0)
    return (
        f"page_table [{S}, {columns}] takes {table} bytes of scalar memory, but may "
        f"take {max(room, 0)}; use {larger_pages}at most {fewer} sequences per call."
    )


def _listed(sizes) -> str:
    return ", ".join(str(size) for size in sizes)
