"""Matrix products of a named operand type, precision and accumulation type."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Product(NamedTuple):
    """An einsum in given operand type and precision that accumulates in `result`."""

    operand: jnp.dtype
    result: jnp.dtype
    precision: jax.lax.Precision | None

    def __call__(self, subscripts, x, y):
        return jnp.einsum(
            subscripts,
            x.astype(self.operand),
            y.astype(self.operand),
            precision=self.precision,
            preferred_element_type=self.result,
        )
