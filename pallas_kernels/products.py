"""Matrix products with a given operand type, precision and accumulation type."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

EXACT = jax.lax.Precision.HIGHEST


class Product(NamedTuple):
    """An einsum of `operand` types in a given precision, accumulated in `result`."""

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


def input_product(inputs, result, precision) -> Product:
    """The product of an operation's inputs, in the widest type among them.

    With precision None it is exact if that is also the accumulation type; narrower
    operands are multiplied as they are.
    """
    operand = max((x.dtype for x in inputs), key=lambda dtype: dtype.itemsize)
    if precision is None and operand == result:
        precision = EXACT
    return Product(operand, result, precision)
