"""The contract of objectives, and checks that an objective keeps it."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Ratio(NamedTuple):
    """A figure with a weight of its own, such as bits per byte.

    Attributes:
        total: scalar, a sum over the batch.
        weight: scalar, its divisor once all parts are summed.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]

    @property
    def mean(self) -> Float[Array, ""]:
        """total / weight; for weight 0 it is the total, which is then 0."""
        return self.total / nonzero(self.weight)


Figure = Float[Array, ""] | Ratio


class Objective(Protocol):
    """See `jaxlab.objectives`."""

    def spec(self) -> Any:
        """Return the specs of the parameters, a tree of `ParamSpec`."""
        ...

    def loss(
        self, params: Any, batch: Any, key: Array
    ) -> tuple[Float[Array, ""], Float[Array, ""], Mapping[str, Figure]]:
        """Return the sum of the losses, its weight, and the figures."""
        ...


def checked_loss(objective: Objective, params: Any, batch: Any, key: Array):
    """Return ``objective.loss(params, batch, key)`` after checking its form.

    Raises:
        TypeError: a result has the wrong form; says which and why.
    """
    result = objective.loss(params, batch, key)
    name = type(objective).__name__
    if not isinstance(result, tuple) or len(result) != 3:
        given = f"{len(result)} values" if isinstance(result, tuple) else repr(result)
        raise TypeError(
            f"{name}.loss returned {given}, but must return (total, weight, figures): "
            "the sum of the losses, its divisor, and a dict of further sums."
        )
    total, weight, figures = result
    if not isinstance(figures, Mapping):
        raise TypeError(
            f"{name}.loss returned figures of type {type(figures).__name__}, but they "
            "must be a dict from names to scalars; return {} for none."
        )
    scalars = {"total": total, "weight": weight}
    for figure, value in figures.items():
        if isinstance(value, Ratio):
            scalars[f"{figure}.total"] = value.total
            scalars[f"{figure}.weight"] = value.weight
        else:
            scalars[figure] = value
    for scalar, value in scalars.items():
        if not isinstance(value, jax.Array) or value.shape != ():
            shape = getattr(value, "shape", None)
            given = repr(value) if shape is None else f"an array of shape {shape}"
            raise TypeError(
                f"{name}.loss returned {given} for {scalar}, which must be a scalar "
                "array, summed over the batch."
            )
    return total, weight, figures


def nonzero(weight: Array) -> Array:
    """Replace a weight of 0 by 1."""
    return jnp.where(weight > 0, weight, jnp.ones_like(weight))


def with_weight(figures: Mapping[str, Figure], weight: Array) -> dict[str, Ratio]:
    """Turn every figure into a ratio; plain sums get the weight of the batch."""
    return {
        name: figure if isinstance(figure, Ratio) else Ratio(figure, weight)
        for name, figure in figures.items()
    }
