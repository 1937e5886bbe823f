"""What the TPU kernels of the delta rule can take, and how they divide it."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import layout, partition
from pallas_kernels.tpu.tiles import LANES

KEYS = LANES  # a chunk, one vector register wide
BLOCK = 32  # of the triangular system
BESIDE = KEYS // BLOCK  # heads beside one another in the lanes
GROUP = 2 * BESIDE  # heads whose blocks fill the sublanes
MOST_STEPS = 8
MOST_CHANNELS = 2048  # a grid step, where its heads are no GROUP
HEAD_SIZES = (64, 128, 256)


def unsupported(arrays: dict[str, Array | None], chunk_size: int | None) -> str | None:
    """Why the kernel cannot take these arguments of `delta_product`, or None."""
    k, v = arrays["k"], arrays["v"]
    assert k is not None and v is not None
    N, H, K = k.shape[2:]
    for name, size in (("K", K), ("V", v.shape[-1])):
        if size not in HEAD_SIZES:
            nearest = min(HEAD_SIZES, key=lambda s: (s < size, abs(s - size)))
            return (
                f"the TPU kernel takes head sizes {HEAD_SIZES}, but {name} is {size}; "
                f"the nearest is {nearest} (pad with zeros), or pass "
                "implementation='xla'."
            )
    if N > MOST_STEPS:
        return (
            f"the TPU kernel takes at most {MOST_STEPS} steps a token, but there are "
            f"{N}; pass implementation='xla'."
        )
    most, of_device = MOST_CHANNELS // max(K, v.shape[-1]), partition.part("H", H)
    if of_device > most and of_device % GROUP:
        return (
            f"the TPU kernel takes at most {most} heads of this size on a device or a "
            f"multiple of {GROUP}, but there are {of_device}; the nearest is "
            f"{of_device + -of_device % GROUP}, or pass implementation='xla'."
        )
    if chunk_size not in (None, chunk_tokens(N)):
        return (
            f"the TPU kernel's chunk has {chunk_tokens(N)} tokens with {N} steps a "
            f"token, but chunk_size is {chunk_size}; pass None."
        )
    wide = [n for n, x in arrays.items() if x is not None and x.dtype == jnp.float64]
    if wide:
        return f"a TPU has no float64, but {', '.join(wide)} has it; cast to float32."
    return None


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
    def choose(cls, H: int, steps: int, K: int, V: int, gated: bool, exact: bool):
        """With as many of H heads as fill the chain and leave room in VMEM."""
        heads = H
        if H % GROUP == 0:
            small = max(K, V) <= 128 and not exact
            heads = 2 * GROUP if small and H % (2 * GROUP) == 0 else GROUP
        return cls(heads, steps, K, V, gated, exact)

    @property
    def groups(self) -> list[range]:
        """The heads by GROUP."""
        firsts = range(0, self.heads, GROUP)
        return [range(h, min(h + GROUP, self.heads)) for h in firsts]

    @property
    def vmem(self) -> int:
        """Bytes that the compiler may take; a chip of any generation has 63 MiB."""
        channels = self.heads * max(self.K, self.V) * (2 if self.exact else 1)
        return (32 if channels <= MOST_CHANNELS else 56) * 2**20

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
