"""AdAdaGrad: AdaGrad whose batch grows until its gradient is surer than its noise.

The update, with g the mean gradient of a batch, is one of

- "coordinates", AdaGrad: v <- v + g^2,      x <- x - rate g / sqrt(v);
- "norm", AdaGrad-Norm: b^2 <- b^2 + ||g||^2,    x <- x - rate g / b.

The batch grows by the norm test, which serves any optimizer: see
`jaxlab.optimizers.norm_test`.

Differs from the paper in: the sums start at `initial` instead of a term added to the
root; learning rates are per step, where the paper's are per sample.

Reference: Lau, Liu, Kolar, AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient
Methods, arXiv 2402.11215.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxlab.optimizers.recipe import from_settings, recipe
from jaxlab.optimizers.schedules import Schedule, WarmupCosine
from jaxlab.optimizers.settings import RECIPE, Range, check
from jaxlab.optimizers.trees import checked

VARIANTS = ("coordinates", "norm")
RANGES = {
    **RECIPE,
    "initial": Range(
        "finite and above 0",
        "the sums of squares start at it, so that a gradient of 0 is not divided by 0",
        above=0.0,
    ),
}


class AdaGradState(NamedTuple):
    """State of `scale_by_adagrad`: the sums of squared gradients, float32."""

    squares: Any


class AdaGradNormState(NamedTuple):
    """State of `scale_by_adagrad_norm`: the sum of squared norms."""

    square: Float[Array, ""]


def scale_by_adagrad(initial: float = 1e-10) -> optax.GradientTransformationExtraArgs:
    """Gradients over the root of the sum of their squares, coordinate by coordinate.

    Args:
        initial: value of the sums before the first step; above 0.

    Raises:
        ValueError: `initial` is not above 0, or trees that differ in a leaf.
    """
    check(RANGES, initial=initial)

    def init(params: Any) -> AdaGradState:
        return AdaGradState(
            jax.tree.map(lambda p: jnp.full_like(p, initial, dtype=jnp.float32), params)
        )

    def update(updates, state: Any, params=None, **_):
        del params
        squares = jax.tree.map(
            lambda v, g: v + jnp.square(g.astype(jnp.float32)), state.squares, updates
        )
        updates = jax.tree.map(
            lambda g, v: (g.astype(jnp.float32) / jnp.sqrt(v)).astype(g.dtype),
            updates,
            squares,
        )
        return updates, AdaGradState(squares)

    return checked(optax.GradientTransformationExtraArgs(init, update))


def scale_by_adagrad_norm(
    initial: float = 1e-10,
) -> optax.GradientTransformationExtraArgs:
    """Gradients over the root of the sum of the squared norms of the whole gradient.

    Args:
        initial: value of the sum before the first step; above 0.

    Raises:
        ValueError: `initial` is not above 0.
    """
    check(RANGES, initial=initial)

    def init(params: Any) -> AdaGradNormState:
        del params  # one number serves all
        return AdaGradNormState(jnp.full((), initial, jnp.float32))

    def update(updates, state: Any, params=None, **_):
        del params
        wide = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        square = state.square + optax.tree.norm(wide, squared=True)
        updates = jax.tree.map(
            lambda g, x: (x / jnp.sqrt(square)).astype(g.dtype), updates, wide
        )
        return updates, AdaGradNormState(square)

    return checked(optax.GradientTransformationExtraArgs(init, update))


def adadagrad(
    learning_rate: float | optax.Schedule,
    *,
    variant: str = "coordinates",
    initial: float = 1e-10,
    weight_decay: float = 0.0,
    clip: float | None = None,
    specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """AdAdaGrad's update on any pytree: the gradient over the root of summed squares.

    `BatchGrowth` makes the batch grow, for this optimizer and any other.

    Args:
        learning_rate: a number or a schedule.
        variant: "coordinates" sums the squares of each coordinate, "norm" those of the
            norm of the whole gradient.
        initial: value of the sums of squares before the first step.
        weight_decay: share of the weights that is taken away at each step, times the
            learning rate; of matrices and heads, not of other roles.
        clip: largest norm of the whole gradient; None for no clipping.
        specs: tree of `ParamSpec`; None derives the roles from the arrays, as
            `jaxlab.params.infer` does.

    Returns:
        A transformation whose `update` takes the parameters too.

    Raises:
        ValueError: a setting outside its range; or, at `init` and `update`, trees that
            differ in a leaf, which is named.

    Reference: Lau, Liu, Kolar, arXiv 2402.11215.
    """
    check(RANGES, initial=initial)
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is not one of {VARIANTS}.")
    by_coordinates = variant == "coordinates"
    scale = scale_by_adagrad if by_coordinates else scale_by_adagrad_norm

    def method(specs):
        del specs  # every parameter is treated alike
        return scale(initial)

    return recipe(learning_rate, specs, method, weight_decay=weight_decay, clip=clip)


@dataclasses.dataclass(frozen=True)
class AdAdaGrad:
    """Settings of AdAdaGrad's updates; `BatchGrowth` has those of its batch."""

    learning_rate: float = 1e-2  # at its peak; "norm" wants a larger one
    schedule: Schedule = WarmupCosine()
    variant: str = "coordinates"  # or "norm"
    initial: float = 1e-10  # value of the sums of squares before the first step
    weight_decay: float = 0.0  # times the learning rate; the paper uses none
    clip: float | None = 1.0  # largest norm of the whole gradient; None for no clipping

    def __post_init__(self):
        check(RANGES, **vars(self))

    def build(self, specs: Any, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation for parameters `specs` and a run of `steps`.

        Raises:
            ValueError: `variant` is not one of `VARIANTS`.
        """
        return from_settings(adadagrad, self, specs, steps)
