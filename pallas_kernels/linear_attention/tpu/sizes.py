"""The limits and sizes of the TPU kernels of linear attention."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.tpu import block_sizes, limits
from pallas_kernels.tpu.limits import groups
from pallas_kernels.tpu.tiles import LANES

CHUNK = LANES  # tokens; a matrix of their pairs is one vector register wide


def unsupported(arrays: dict[str, Array | None], chunk_size: int | None) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    return limits.unsupported(arrays, chunk_size, CHUNK, "")


class Sizes(NamedTuple):
    """The static parameters of a kernel.

    Attributes:
        heads: heads in a grid step.
        in_turns: heads whose stages are emitted in turns; with fewer, less is spilled.
        K, V: channels of a head's keys and values.
        decay: "head", "channel", or None.
        exact: whether products are float32, else their operands are bfloat16.
    """

    heads: int
    in_turns: int
    K: int
    V: int
    decay: str | None
    exact: bool

    @classmethod
    def choose(cls, kernel: str, H: int, K: int, V: int, g: Array | None, exact: bool):
        """The sizes for a kernel, with the best number of heads in a grid step."""
        decay = None if g is None else "head" if g.ndim == 5 else "channel"
        best = block_sizes.of(f"{kernel}, a {decay or 'head'}'s decay")
        size = max(K, V) * (2 if exact else 1)
        heads = limits.heads_together(H, size, best["heads"])
        return cls(heads, best["in_turns"], K, V, decay, exact)

    @property
    def together(self) -> list[range]:
        """The heads, divided into those that run in turns."""
        return groups(self.heads, self.in_turns)

    @property
    def vmem(self) -> int:
        """Bytes of VMEM that the compiler may use."""
        return limits.vmem(self.heads, self.K, self.V, self.exact)

    @property
    def operand(self):
        """The type of the products' operands."""
        return jnp.float32 if self.exact else jnp.bfloat16

    def key_lanes(self, h: int) -> slice:
        """Lanes of a head's keys and queries."""
        return slice(h * self.K, (h + 1) * self.K)

    def value_lanes(self, h: int) -> slice:
        """Lanes of a head's values."""
        return slice(h * self.V, (h + 1) * self.V)
