"""The limits of the TPU kernels over chunks of tokens, and their division of heads."""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import partition
from pallas_kernels.tpu.tiles import SUBLANES

HEAD_SIZES = (64, 128, 256)
GROUP = SUBLANES  # heads whose gates fill the sublanes
MOST_CHANNELS = 2048  # in a grid step whose heads do not form groups


def unsupported(
    arrays: dict[str, Array | None], chunk_size: int | None, chunk: int, having: str
) -> str | None:
    """Why a kernel cannot take these arguments, or None.

    Args:
        arrays: arguments by name, with k [..., H, K] and v [..., H, V].
        chunk_size: the caller's chunk size.
        chunk: tokens in a chunk of the kernel.
        having: a phrase for the message on why there are so many tokens.
    """
    k, v = arrays["k"], arrays["v"]
    assert k is not None and v is not None
    H, K = k.shape[-2:]
    for name, size in (("K", K), ("V", v.shape[-1])):
        if size not in HEAD_SIZES:
            nearest = min(HEAD_SIZES, key=lambda s: (s < size, abs(s - size)))
            return (
                f"the TPU kernel takes head sizes {HEAD_SIZES}, but {name} is {size}; "
                f"the nearest is {nearest} (pad with zeros), or pass "
                "implementation='xla'."
            )
    most, heads = MOST_CHANNELS // max(K, v.shape[-1]), partition.part("H", H)
    if heads > most and heads % GROUP:
        return (
            f"the TPU kernel takes at most {most} heads of this size on a device or a "
            f"multiple of {GROUP}, but there are {heads}; the nearest is "
            f"{heads + -heads % GROUP}, or pass implementation='xla'."
        )
    if chunk_size not in (None, chunk):
        return (
            f"the TPU kernel's chunk has {chunk} tokens{having}, but chunk_size is "
            f"{chunk_size}; pass None."
        )
    return no_float64(arrays)


def no_float64(arrays: dict[str, Array | None]) -> str | None:
    """Why a TPU cannot take the arguments' types, or None."""
    wide = [n for n, x in arrays.items() if x is not None and x.dtype == jnp.float64]
    if wide:
        return f"a TPU has no float64, but {', '.join(wide)} has it; cast to float32."
    return None


def heads_together(H: int, size: int, most: int) -> int:
    """The number of heads in a grid step: whole groups, or all H if GROUP does not fit.

    Args:
        size: lanes per head, twice as many for float32 products.
        most: the best number, if there are as many heads and VMEM has room.
    """
    if H % GROUP:
        return H
    most = min(most, MOST_CHANNELS // size)
    return max([n for n in range(GROUP, most + 1, GROUP) if H % n == 0] or [GROUP])


def groups(heads: int, size: int = GROUP) -> list[range]:
    """Divide the heads of a grid step into groups of `size`."""
    return [range(h, min(h + size, heads)) for h in range(0, heads, size)]


def vmem(heads: int, K: int, V: int, exact: bool) -> int:
    """Bytes of VMEM that the compiler may use; chips of all generations have 63 MiB."""
    channels = heads * max(K, V) * (2 if exact else 1)
    return (32 if channels <= MOST_CHANNELS else 56) * 2**20
