"""The limits and sizes of the TPU kernels of the selective scan."""

from jaxtyping import Array

from pallas_kernels.tpu import block_sizes
from pallas_kernels.tpu.limits import no_float64
from pallas_kernels.tpu.tiles import LANES, SUBLANES

CHUNK = LANES  # tokens
MOST_STATES = 32
VMEM = 40 * 2**20


def unsupported(arrays: dict[str, Array | None], chunk_size: int | None) -> str | None:
    """Why the kernel cannot take these arguments of `selective_scan`, or None."""
    A = arrays["A"]
    assert A is not None
    E, N = A.shape
    if E % LANES:
        return (
            f"the TPU kernel takes a multiple of {LANES} channels, but E is {E}; the "
            f"nearest is {E + -E % LANES} (pad with zeros), or pass "
            "implementation='xla'."
        )
    if N > MOST_STATES:
        return (
            f"the TPU kernel takes at most {MOST_STATES} states per channel, but N is "
            f"{N}; pass implementation='xla'."
        )
    if N % SUBLANES:
        return (
            f"the TPU kernel takes a multiple of {SUBLANES} states per channel, but N "
            f"is {N}; the nearest is {N + -N % SUBLANES} (pad with zeros), or pass "
            "implementation='xla'."
        )
    if chunk_size not in (None, CHUNK):
        return (
            f"the TPU kernel's chunk has {CHUNK} tokens, but chunk_size is "
            f"{chunk_size}; pass None."
        )
    return no_float64(arrays)


def sizes(kernel: str, groups: int) -> tuple[int, int]:
    """Groups of channels in a grid step, a divisor of `groups`; blocks unrolled."""
    best = block_sizes.of(kernel)
    fits = [n for n in range(1, best["heads"] + 1) if groups % n == 0]
    return max(fits), best["unroll"]
