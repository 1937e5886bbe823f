"""What the TPU kernels of the delta rule can take, and how they divide it."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import layout
from pallas_kernels.tpu import block_sizes, limits
from pallas_kernels.tpu.limits import GROUP
from pallas_kernels.tpu.tiles import LANES

KEYS = LANES  # a chunk, one vector register wide
BLOCK = 32  # of the triangular system
BESIDE = KEYS // BLOCK  # heads beside one another in the lanes; two such in a GROUP
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
    """Tokens a chunk: a power of two, at most KEYS keys of so many steps a token."""
    return layout.round_up_to_power_of_two(KEYS // steps + 1) // 2


class Sizes(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        heads: of a grid step.
        steps: N, keys a token.
        K, V: of a head.
        gated: whether there is a decay.
        exact: float32 products, else bfloat16 passes.
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
        """With as many of H heads as are best for a kernel."""
        size = max(K, V) * (2 if exact else 1)
        heads = limits.heads_together(H, size, block_sizes.of(kernel)["heads"])
        return cls(heads, steps, K, V, gated, exact)

    @property
    def vmem(self) -> int:
        """Bytes that the compiler may take."""
        return limits.vmem(self.heads, self.K, self.V, self.exact)

    @property
    def operand(self):
        """The type of the products' operands."""
        return jnp.float32 if self.exact else jnp.bfloat16

    @property
    def packs(self) -> int:
        """Packs of BESIDE heads, of which GROUP and so two come together."""
        return -(-self.heads // GROUP) * (GROUP // BESIDE)


def pack_row(head: int) -> int:
    """Row at which the pack of a head starts."""
    return head // BESIDE * KEYS
