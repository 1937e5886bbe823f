"""The operands and masks of every implementation of paged attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# The value of a masked score: finite, so that the difference of two is not NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def accumulation(dtype) -> jnp.dtype:
    """float32, or float64 for float64."""
    return jnp.dtype("float64" if dtype == "float64" else "float32")


class Operands(NamedTuple):
    """The arrays, checked and made safe to index with.

    Attributes:
        q: [Tq, Hq, D], Tq >= 1.
        k_pages, v_pages: [P, page, Hkv, D].
        page_table: [S, pages_per_seq] int32; every entry is a valid page.
        kv_lens: [S] int32, at most pages_per_seq * page.
        cu_q_lens: [S + 1] int32, from 0 to at most Tq.
        k_scale, v_scale: [P, page, Hkv] in the accumulation type, or None.
        scale: factor of the scores; includes the keys' scale if that is one number.
    """

    q: Float[Array, "Tq Hq D"]
    k_pages: Array
    v_pages: Array
    page_table: Int[Array, "S pages_per_seq"]
    kv_lens: Int[Array, "S"]
    cu_q_lens: Int[Array, "S+1"]
    k_scale: Float[Array, "P page Hkv"] | None
    v_scale: Float[Array, "P page Hkv"] | None
    scale: Float[Array, ""]

    @property
    def accumulation(self) -> jnp.dtype:
        """The dtype of sums and results: float32, or float64 for float64 queries."""
        return accumulation(self.q.dtype)

    @property
    def product(self) -> jnp.dtype:
        """The dtype of the products' operands: the wider of queries and pages.

        Quantised pages are multiplied in the queries' dtype, which represents all their
        values exactly.
        """
        return max(self.q.dtype, self.k_pages.dtype, key=lambda dtype: dtype.itemsize)


AXES = ("QHD", "PLHD", "PLHD", "SN", "S", "Z", "PLH", "PLH", "")
"""The axes of each operand, one letter per axis, for `partition`; Z = S + 1."""


class Masks(NamedTuple):
    """The mask and the bound of the scores; known before compilation.

    Attributes:
        window: the number of keys a query sees, including its own; None for all.
        soft_cap: c in c tanh(s / c); None for unbounded scores.
    """

    window: int | None
    soft_cap: float | None

    def seen(self, q_position: jax.Array, k_position: jax.Array) -> jax.Array:
        """Whether a query sees a key, for positions with shapes that broadcast."""
        seen = k_position <= q_position
        if self.window is None:
            return seen
        return seen & (k_position > q_position - self.window)

    def cap(self, scores: jax.Array) -> jax.Array:
        """The scores, bounded by the soft cap."""
        if self.soft_cap is None:
            return scores
        return self.soft_cap * jnp.tanh(scores / self.soft_cap)
