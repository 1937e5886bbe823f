"""A weight plus a product of two thin matrices: a population member or an adapter."""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxlab.params.products import (
    Leaf,
    Weight,
    embed,
    grouped_linear,
    linear,
    linear_t,
    value,
)


@struct.dataclass
class LowRank(Leaf):
    """The weight ``w + scale a b^T``, never formed: ``x w + scale (x a) b^T``.

    Attributes:
        w: base weight ``[in, out]``, any leaf.
        a: ``[in, rank]``.
        b: ``[out, rank]``.
        scale: float32, one number per weight, so that weights may share a and b; None
            for 1.

    Reference: "Evolution Strategies at the Hyperscale", arXiv 2511.16652.
    """

    w: Weight
    a: Float[Array, "*stack in rank"]
    b: Float[Array, "*stack out rank"]
    scale: Float[Array, "*stack"] | None = None

    def linear(self, x):
        """``x w + scale (x a) b^T``."""
        return linear(x, self.w) + linear_t(self._scaled(linear(x, self.a)), self.b)

    def linear_t(self, x):
        """``x w^T + scale (x b) a^T``."""
        return linear_t(x, self.w) + linear_t(self._scaled(linear(x, self.b)), self.a)

    def grouped_linear(self, x, sizes):
        """`linear` for rows in groups."""
        inner = grouped_linear(x, self._scaled_a(), sizes)
        return grouped_linear(x, self.w, sizes) + grouped_linear(
            inner, self.b.mT, sizes
        )

    def embed(self, ids, dtype: Any = jnp.float32):
        """Rows `ids` of the sum."""
        inner = self._scaled(embed(self.a, ids, dtype))
        return embed(self.w, ids, dtype) + linear_t(inner, self.b)

    def value(self) -> Array:
        """The sum, as an array."""
        return value(self.w) + self._scaled_a() @ self.b.mT

    def _scaled(self, x: Array) -> Array:
        return x if self.scale is None else _times(self.scale, x)

    def _scaled_a(self) -> Array:
        """``scale a`` for each of the stacked weights."""
        if self.scale is None:
            return self.a
        return _times(self.scale[..., None, None], self.a)


def _times(scale: Array, x: Array) -> Array:
    """``scale x`` in the dtype of `x`, multiplied in float32."""
    return (scale * x.astype(jnp.float32)).astype(x.dtype)
