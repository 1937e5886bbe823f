"""The limits and sizes of the TPU kernels of the delta rule."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import layout
from pallas_kernels.tpu import block_sizes, limits
from pallas_kernels.tpu.limits import GROUP
from pallas_kernels.tpu.tiles import LANES

KEYS = LANES  # keys per chunk; a matrix of their pairs is one vector register wide
BLOCK = 32  # rows of a block of the triangular system
PACK = KEYS // BLOCK  # heads side by side in the lanes; a GROUP has two packs
MOST_STEPS = 8


def unsupported(arrays: dict[str, Array | None], chunk_size: int | None) -> str | None:
    """Why the kernel cannot take these arguments of `delta_product`, or None."""
    k = arrays["k"]
    assert k is not None
    N = k.shape[2]
    if N > MOST_STEPS:
        return (
            f"the TPU kernel takes at most {MOST_STEPS} steps a token, but there are "
            f"{N}; pass implementation='xla'."
        )
    having = f" with {N} steps a token"
    return limits.unsupported(arrays, chunk_size, chunk_tokens(N), having)


def chunk_tokens(steps: int) -> int:
    """Tokens per chunk: the largest power of two with at most KEYS keys."""
    return layout.round_up_to_power_of_two(KEYS // steps + 1) // 2


class Sizes(NamedTuple):
    """The static parameters of a kernel.

    Attributes:
        heads: heads in a grid step.
        steps: N, keys per token.
        K, V: channels of a head's keys and values.
        gated: whether there is a decay.
        exact: whether products are float32, else bfloat16 passes.
    """

    heads: int
    steps: int
    K: int
    V: int
    gated: bool
    exact: bool

    @classmethod
    def choose(
        cls, kernel: str, H: int, steps: int, K: int, V: int, gated: bool, exact: bool
    ):
        """The sizes for a kernel, with the best number of heads in a grid step."""
        size = max(K, V) * (2 if exact else 1)
        heads = limits.heads_together(H, size, block_sizes.of(kernel)["heads"])
        return cls(heads, steps, K, V, gated, exact)

    @property
    def vmem(self) -> int:
        """Bytes of VMEM that the compiler may use."""
        return limits.vmem(self.heads, self.K, self.V, self.exact)

    @property
    def operand(self):
        """The type of the products' operands."""
        return jnp.float32 if self.exact else jnp.bfloat16

    @property
    def packs(self) -> int:
        """The number of packs of PACK heads, two for every GROUP of heads."""
        return -(-self.heads // GROUP) * (GROUP // PACK)


def pack_row(head: int) -> int:
    """The first row of the pack that contains a head."""
    return head // PACK * KEYS
