"""A weight knows how to multiply.

Models use weights only through `linear`, `linear_t`, `grouped_linear`, `embed` and
`value`. A weight is an array ``[in, out]`` or a `Leaf` with methods of these names, so
that a model works with every kind of weight and never asks which it holds. Each kind of
leaf is a file in `jaxlab.params.leaves`, and they nest; to add your own, write a class
with the methods that your model needs:

    linear(x)                  x w          x [*rows, in] to [*rows, out]
    linear_t(x)                x w^T        x [*rows, out] to [*rows, in]
    grouped_linear(x, sizes)   x_n w_m      rows in groups, one stacked weight for each
    embed(ids, dtype)          rows of w    ids [*rows] to [*rows, out]
    value()                    the array that it stands for

Results are in the dtype of `x`. Stacked layers add leading axes to every array of a
leaf, and `jax.lax.scan` peels them off.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.params.grouped import grouped_matmul

Weight = Any  # an array, or a Leaf


class Leaf:
    """A weight that is not an array; implicit conversion to one raises TypeError."""

    def _refuse(self, *_args, **_kwargs):
        raise TypeError(
            f"{type(self).__name__} is a structured weight, not an array: multiply "
            "with linear(x, w), linear_t(x, w) or embed(w, ids), or materialise it "
            "with value(w)."
        )

    __array__ = __jax_array__ = _refuse


def linear(x: Float[Array, "*rows in"], w: Weight) -> Float[Array, "*rows out"]:
    """``x w`` in the dtype of `x`."""
    if isinstance(w, Leaf):
        return _operation(w, "linear")(x)
    return x @ w.astype(x.dtype)


def linear_t(x: Float[Array, "*rows out"], w: Weight) -> Float[Array, "*rows in"]:
    """``x w^T`` in the dtype of `x` (a tied head: `w` is the embedding table)."""
    if isinstance(w, Leaf):
        return _operation(w, "linear_t")(x)
    return x @ w.astype(x.dtype).mT


def grouped_linear(
    x: Float[Array, "N in"], w: Weight, sizes: Int[Array, " M"]
) -> Float[Array, "N out"]:
    """``y_n = x_n w_m`` for the rows n of group m, in the dtype of `x`.

    Args:
        x: rows, sorted by group.
        w: M weights, stacked.
        sizes: number of rows in each group, summing to at most N; the remaining rows
            give 0.
    """
    if isinstance(w, Leaf):
        return _operation(w, "grouped_linear")(x, sizes)
    return grouped_matmul(x, w.astype(x.dtype), sizes)


def embed(
    w: Weight, ids: Int[Array, "*rows"], dtype: Any = jnp.float32
) -> Float[Array, "*rows out"]:
    """Rows `ids` of the table `w` ``[in, out]``, in `dtype`."""
    if isinstance(w, Leaf):
        return _operation(w, "embed")(ids, dtype)
    return w[ids].astype(dtype)


def value(w: Weight) -> Array:
    """The dense array that `w` stands for."""
    return _operation(w, "value")() if isinstance(w, Leaf) else w


def _operation(w: Leaf, name: str) -> Callable:
    """The method `name` of a leaf.

    Raises:
        TypeError: the leaf has no such method.
    """
    method = getattr(w, name, None)
    if method is None:
        raise TypeError(
            f"{type(w).__name__} has no operation {name!r}, which the model uses; give "
            "the class a method of this name (jaxlab.params.products describes each)."
        )
    return method
