"""The contract of objectives, and what is said of one that breaks it."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Ratio(NamedTuple):
    """A figure with a weight of its own, such as bits per byte.

    Attributes:
        total: scalar, a sum over the batch.
        weight: scalar, what it is divided by once all parts are summed.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]

    @property
    def mean(self) -> Float[Array, ""]:
        """total / weight; over nothing it is the total, which is 0 then."""
        return self.total / nonzero(self.weight)


Figure = Float[Array, ""] | Ratio


class Objective(Protocol):
    """See `jaxlab.objectives`."""

    def spec(self) -> Any:
        """The parameters, a tree of `ParamSpec`."""
        ...

    def loss(
        self, params: Any, batch: Any, key: Array
    ) -> tuple[Float[Array, ""], Float[Array, ""], Mapping[str, Figure]]:
        """The sum of the losses, its weight, and figures."""
        ...


def checked_loss(objective: Objective, params: Any, batch: Any, key: Array):
    """``objective.loss(params, batch, key)``, whose results are what they must be.

    Raises:
        TypeError: they are not; the message says which and how.
    """
    result = objective.loss(params, batch, key)
    name = type(objective).__name__
    if not isinstance(result, tuple) or len(result) != 3:
        given = f"{len(result)} values" if isinstance(result, tuple) else repr(result)
        raise TypeError(
            f"{name}.loss returned {given}, but must return (total, weight, figures): "
            "the sum of the losses, what it is divided by, and a dict of further sums."
        )
    total, weight, figures = result
    if not isinstance(figures, Mapping):
        raise TypeError(
            f"{name}.loss returned figures of type {type(figures).__name__}, but they "
            "must be a dict of names and scalars; {} for none."
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
            is_now = repr(value) if shape is None else f"an array of shape {shape}"
            raise TypeError(
                f"{name}.loss returned for {scalar} {is_now}, but it must be a scalar "
                "array, summed over the batch."
            )
    return total, weight, figures


def nonzero(weight: Array) -> Array:
    """The weight, or 1 where it is 0."""
    return jnp.where(weight > 0, weight, jnp.ones_like(weight))


def with_weight(figures: Mapping[str, Figure], weight: Array) -> dict[str, Ratio]:
    """All figures as ratios, those that are plain sums over the batch's weight."""
    return {
        name: figure if isinstance(figure, Ratio) else Ratio(figure, weight)
        for name, figure in figures.items()
    }
