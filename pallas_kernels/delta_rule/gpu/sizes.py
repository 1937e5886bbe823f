"""The limits and sizes of the GPU kernels of the delta rule."""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import layout

KEYS = 64  # keys per chunk: the fewest that fill the matrix unit
LEAST_TOKENS = 16  # the least number of terms in a product's sums
CHANNELS = 64  # channels of V per block, the rows of its products
KEY_SIZES = (64, 128)  # for 256 the state does not fit into the registers
MOST_STEPS = 8


def unsupported(arrays: dict[str, Array | None], chunk_size: int | None) -> str | None:
    """Why the kernel cannot take these arguments of `delta_product`, or None."""
    k, v = arrays["k"], arrays["v"]
    assert k is not None and v is not None
    N, K, V = k.shape[2], k.shape[-1], v.shape[-1]
    if N > MOST_STEPS:
        return (
            f"the GPU kernel takes at most {MOST_STEPS} steps a token, but there are "
            f"{N}; pass implementation='xla'."
        )
    if K not in KEY_SIZES:
        nearest = min(KEY_SIZES, key=lambda size: (size < K, abs(size - K)))
        return (
            f"the GPU kernel takes keys of {KEY_SIZES} channels, but K is {K}; the "
            f"nearest is {nearest}{' (pad with zeros)' if nearest > K else ''}, or "
            "pass implementation='xla'."
        )
    if V % CHANNELS:
        return (
            f"the GPU kernel takes values of a multiple of {CHANNELS} channels, but V "
            f"is {V}; the nearest is {V + -V % CHANNELS} (pad with zeros), or pass "
            "implementation='xla'."
        )
    chunk = chunk_tokens(N)
    if chunk_size not in (None, chunk):
        return (
            f"the GPU kernel's chunk has {chunk} tokens with {N} steps a token, but "
            f"chunk_size is {chunk_size}; pass None."
        )
    for name in ("q", "k", "v"):
        dtype = arrays[name].dtype  # pyright: ignore[reportOptionalMemberAccess]
        if dtype != jnp.bfloat16:
            return (
                f"the GPU kernel multiplies bfloat16, but {name} is {dtype}; cast q, k "
                "and v to bfloat16, or pass implementation='xla'."
            )
    wide = [n for n, x in arrays.items() if x is not None and x.dtype == jnp.float64]
    if wide:
        return (
            f"the GPU kernel's states are float32, but {', '.join(wide)} has float64; "
            "cast to float32, or pass implementation='xla'."
        )
    return None


def chunk_tokens(steps: int) -> int:
    """Tokens per chunk: the largest power of two with at most KEYS keys."""
    return layout.round_up_to_power_of_two(KEYS // steps + 1) // 2
