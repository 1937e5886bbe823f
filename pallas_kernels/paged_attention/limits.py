"""Why the TPU kernel cannot serve a call, in sentences; None where it can."""

from pallas_kernels.paged_attention import block_sizes
from pallas_kernels.paged_attention.operands import Operands

HEAD_SIZES = (64, 128, 256)
PAGES = (16, 32, 64, 128, 256)


def misfit(operands: Operands) -> str | None:
    """The sentence for sizes and types that the kernel has no room or no code for."""
    D, (_, page, Hkv, _) = operands.q.shape[-1], operands.k_pages.shape
    if D not in HEAD_SIZES:
        nearest = next((size for size in HEAD_SIZES if size > D), HEAD_SIZES[-1])
        return (
            f"heads have size {D}, but the kernel is for {_listed(HEAD_SIZES)}; "
            f"{nearest} is the nearest, smaller heads can be padded with zeros."
        )
    if page not in PAGES:
        nearest = min(PAGES, key=lambda size: abs(size - page))
        return (
            f"a page has {page} tokens, but the kernel is for {_listed(PAGES)}; "
            f"{nearest} is the nearest."
        )
    for name, dtype in (("q", operands.q.dtype), ("k_pages", operands.k_pages.dtype)):
        if dtype == "float64":
            return f"{name} has dtype float64, which a TPU has not; cast it to float32."
    block_q, pages = block_sizes.tpu(operands)

    def vmem(heads):
        return block_sizes.vmem_bytes(operands, block_q, pages * page, heads)

    if vmem(Hkv) > block_sizes.VMEM_BUDGET:
        fits = (h for h in range(Hkv, 0, -1) if vmem(h) <= block_sizes.VMEM_BUDGET)
        return (
            f"a block of {pages * page} tokens with {Hkv} heads of keys takes "
            f"{vmem(Hkv)} bytes of VMEM and may take {block_sizes.VMEM_BUDGET}; shard "
            f"the heads, at most {next(fits, 0)} a device, or use smaller pages."
        )
    return _table_misfit(operands, block_q)


def _table_misfit(operands: Operands, block_q: int) -> str | None:
    tokens, page = operands.q.shape[0], operands.k_pages.shape[1]
    S, columns = operands.page_table.shape
    schedule = 4 * 6 * (tokens // block_q + S)
    room, table = block_sizes.SMEM_BUDGET - schedule, 4 * S * columns
    if table <= room:
        return None
    wider = next((p for p in PAGES if p > page and table * page <= p * room), None)
    also = f"pages of {wider} tokens or " if wider else ""
    fewer = max(room // (4 * columns), 0)
    return (
        f"page_table [{S}, {columns}] takes {table} bytes of scalar memory and may "
        f"take {max(room, 0)}; use {also}at most {fewer} sequences a call."
    )


def _listed(sizes) -> str:
    return ", ".join(str(size) for size in sizes)
