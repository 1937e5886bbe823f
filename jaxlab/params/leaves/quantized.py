"""An int8 weight with one scale per output channel."""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxlab.params.grouped import grouped_matmul
from jaxlab.params.products import Leaf


@struct.dataclass
class Quantized(Leaf):
    """The weight ``q * scale`` with int8 `q`; it has no gradient.

    Attributes:
        q: int8 ``[in, out]``.
        scale: float32 ``[1, out]``, one step size per output channel.
    """

    q: Int[Array, "*stack in out"]
    scale: Float[Array, "*stack 1 out"]

    def linear(self, x):
        """``(x q) scale``."""
        return (x @ self.q.astype(x.dtype)) * _row(self.scale, x)

    def linear_t(self, x):
        """``(x scale) q^T``."""
        return (x * _row(self.scale, x)) @ self.q.astype(x.dtype).mT

    def grouped_linear(self, x, sizes):
        """`linear` for rows in groups, with the matrices made dense."""
        return grouped_matmul(x, self.value().astype(x.dtype), sizes)

    def embed(self, ids, dtype: Any = jnp.float32):
        """Rows `ids`, scaled."""
        rows = self.q[ids].astype(dtype)
        return rows * _row(self.scale, rows)

    def value(self) -> Array:
        """``q scale``."""
        return self.q.astype(self.scale.dtype) * self.scale


def quantize(w: Float[Array, "*stack in out"]) -> Quantized:
    """Round to int8; the largest absolute value of each output channel becomes 127."""
    largest = jnp.max(jnp.abs(w), axis=-2, keepdims=True).astype(jnp.float32)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    q = jnp.round(w.astype(jnp.float32) / scale).astype(jnp.int8)
    return Quantized(q, scale)


def _row(scale: Array, like: Array) -> Array:
    """Scales ``[1, out]`` with the rank and dtype of activations ``[*rows, out]``."""
    return scale.reshape((1,) * (like.ndim - 1) + (-1,)).astype(like.dtype)
