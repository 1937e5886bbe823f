"""What the TPU kernels of linear attention can take, and how they divide it."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.tpu import block_sizes, limits
from pallas_kernels.tpu.limits import groups
from pallas_kernels.tpu.tiles import LANES

CHUNK = LANES  # tokens: their pairs are one vector register wide


def unsupported(arrays: dict[str, Array | None], chunk_size: int | None) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    return limits.unsupported(arrays, chunk_size, CHUNK, "")


class Sizes(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        heads: of a grid step.
        in_turns: heads whose stages are emitted in turns: few of many factors spill
          less.
        K, V: of a head.
        decay: "head", "channel", or None.
        exact: float32 products, else bfloat16 operands.
    """

    heads: int
    in_turns: int
    K: int
    V: int
    decay: str | None
    exact: bool

    @classmethod
    def choose(cls, kernel: str, H: int, K: int, V: int, g: Array | None, exact: bool):
        """With as many of H heads as are best for a kernel."""
        decay = None if g is None else "head" if g.ndim == 5 else "channel"
        best = block_sizes.of(f"{kernel}, a {decay or 'head'}'s decay")
        size = max(K, V) * (2 if exact else 1)
        heads = limits.heads_together(H, size, best["heads"])
        return cls(heads, best["in_turns"], K, V, decay, exact)

    @property
    def together(self) -> list[range]:
        """The heads by those in turns."""
        return groups(self.heads, self.in_turns)

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
