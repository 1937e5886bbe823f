"""What the TPU kernels of linear attention can take, and how they divide it."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.tpu import limits
from pallas_kernels.tpu.limits import GROUP, groups
from pallas_kernels.tpu.tiles import LANES

CHUNK = LANES  # tokens: their pairs are one vector register wide


def unsupported(arrays: dict[str, Array | None], chunk_size: int | None) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    return limits.unsupported(arrays, chunk_size, CHUNK, "")


class Sizes(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        heads: of a grid step.
        K, V: of a head.
        decay: "head", "channel", or None.
        exact: float32 products, else bfloat16 operands.
    """

    heads: int
    K: int
    V: int
    decay: str | None
    exact: bool

    @classmethod
    def choose(cls, H: int, K: int, V: int, g: Array | None, exact: bool):
        """GROUP of the H heads, or all where they make no groups."""
        decay = None if g is None else "head" if g.ndim == 5 else "channel"
        return cls(GROUP if H % GROUP == 0 else H, K, V, decay, exact)

    @property
    def together(self) -> list[range]:
        """Heads whose stages are emitted in turns: few of many factors spill less."""
        return groups(self.heads, GROUP // 2 if self.decay == "channel" else GROUP)

    @property
    def vmem(self) -> int:
        """Bytes that the compiler may take."""
        return limits.vmem(self.heads, self.K, self.V, self.exact)

    @property
    def operand(self):
        """The type of the products' operands."""
        return jnp.float32 if self.exact else jnp.bfloat16

    def of_keys(self, h: int) -> slice:
        """Lanes of a head's keys and queries."""
        return slice(h * self.K, (h + 1) * self.K)

    def of_values(self, h: int) -> slice:
        """Lanes of a head's values."""
        return slice(h * self.V, (h + 1) * self.V)
