"""AdAdaGrad: AdaGrad whose batch grows until its gradient is surer than its noise.

The update, with g the mean gradient of a batch, is one of

- "coordinates", AdaGrad: v <- v + g^2,      x <- x - rate g / sqrt(v);
- "norm", AdaGrad-Norm: b^2 <- b^2 + ||g||^2,    x <- x - rate g / b.

The batch passes the norm test if the variance of its mean is small beside the mean. In
J groups of b / J rows with mean gradients g_j,

    V = (b / J) / (J - 1) sum_j ||g_j - g||^2      (the variance of one row's gradient),
    passes if V / b <= eta^2 ||g||^2,   else the next b = ceil(V / (eta^2 ||g||^2)).

It never shrinks. Since g is the mean of the g_j, the sum is
sum_j ||g_j||^2 - J ||g||^2: a training step hands over two numbers, and the host
decides (`BatchController`).

Where noise is all there is, ||g||^2 is about V / b, so that one test asks for at most
about b / eta^2; where the batch is just large enough, it asks for 1 / (1 + eta^2) of
what the true gradient would. With few groups V scatters, and as the batch never shrinks
its largest value counts: take more groups, or the means of both numbers over a few
steps of one batch.

Differs from the paper in: the sums start at `initial` instead of a term added to the
root; the batch is rounded up to a power of two micro-batches, so that few programs are
compiled; learning rates are of steps, where the paper's are of samples; the test by
coordinates needs the sums of each coordinate, and the inner-product test each group's
product with the mean, which is known only after the last group, and neither is here.

Reference: Lau, Liu, Kolar, AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient
Methods, arXiv 2402.11215.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxlab.optimizers.recipe import from_settings, recipe
from jaxlab.optimizers.schedules import Schedule, WarmupCosine
from jaxlab.optimizers.settings import RECIPE, Range, check
from jaxlab.optimizers.trees import check_agree

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
        initial: of the sums; above 0.

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
        check_agree(updates, state.squares, "parameters given to init")
        squares = jax.tree.map(
            lambda v, g: v + jnp.square(g.astype(jnp.float32)), state.squares, updates
        )
        updates = jax.tree.map(
            lambda g, v: (g.astype(jnp.float32) / jnp.sqrt(v)).astype(g.dtype),
            updates,
            squares,
        )
        return updates, AdaGradState(squares)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_adagrad_norm(
    initial: float = 1e-10,
) -> optax.GradientTransformationExtraArgs:
    """Gradients over the root of the sum of the squared norms of the whole gradient.

    Args:
        initial: of the sum; above 0.

    Raises:
        ValueError: `initial` is not above 0.
    """
    check(RANGES, initial=initial)

    def init(params: Any) -> AdaGradNormState:
        del params  # one number for all
        return AdaGradNormState(jnp.full((), initial, jnp.float32))

    def update(updates, state: Any, params=None, **_):
        del params
        wide = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        square = state.square + optax.tree.norm(wide, squared=True)
        updates = jax.tree.map(
            lambda g, x: (x / jnp.sqrt(square)).astype(g.dtype), updates, wide
        )
        return updates, AdaGradNormState(square)

    return optax.GradientTransformationExtraArgs(init, update)


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

    The batch that grows is `BatchGrowth`, and `gradient_variance` tests it.

    Args:
        learning_rate: a number or a schedule.
        variant: "coordinates" sums the squares of each coordinate, "norm" those of the
            norm of the whole gradient.
        initial: of the sums of squares.
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
        del specs  # it is the same for all
        return scale(initial)

    return recipe(learning_rate, specs, method, weight_decay=weight_decay, clip=clip)


@dataclasses.dataclass(frozen=True)
class AdAdaGrad:
    """Settings of AdAdaGrad's updates; those of its batch are `BatchGrowth`."""

    learning_rate: float = 1e-2  # the peak; "norm" wants a larger one
    schedule: Schedule = WarmupCosine()
    variant: str = "coordinates"  # or "norm"
    initial: float = 1e-10  # of the sums of squares
    weight_decay: float = 0.0  # times the learning rate; the paper has none
    clip: float | None = 1.0  # largest norm of the whole gradient; None for any

    def __post_init__(self):
        check(RANGES, **vars(self))

    def build(self, specs: Any, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation for parameters `specs` and a run of `steps`.

        Raises:
            ValueError: `variant` is not one of `VARIANTS`.
        """
        return from_settings(adadagrad, self, specs, steps)


# The batch ----------------------------------------------------------------------------


def gradient_variance(
    squares: float, mean_square: float, groups: int, batch: int
) -> float:
    """Variance of one row's gradient, all coordinates together: V above.

    A step that accumulates parts, or adds over devices, keeps beside the sum of their
    gradients one number, the sum of the squared norms, and at its end takes the squared
    norm of the mean. No gradient is kept, and devices exchange one number more.

    The g_j are those whose mean is the gradient of the step. Where groups weigh
    differently, as when they have different numbers of targets, s_j is the gradient of
    a group's sum and W the weight of the whole batch, g = sum_j s_j / W and so
    g_j = J s_j / W: ``squares`` is (J / W)^2 sum_j ||s_j||^2.

    Args:
        squares: sum_j ||g_j||^2.
        mean_square: ||g||^2, before clipping.
        groups: J, at least 2.
        batch: rows of all groups together.

    Returns:
        V, and 0 where rounding would leave it below.

    Raises:
        ValueError: fewer than two groups, or numbers that are no sums of squares.
    """
    if groups < 2:
        raise ValueError(
            f"The norm test compares groups of a batch, and groups={groups}; "
            "accumulate at least 2 micro-batches, or take the gradients of 2 devices."
        )
    if not (0 <= squares < math.inf and 0 <= mean_square < math.inf):
        raise ValueError(
            f"squares={squares} and mean_square={mean_square} are squared norms of "
            "gradients and must be finite and not below 0."
        )
    spread = max(float(squares) - groups * float(mean_square), 0.0)
    return batch / groups / (groups - 1) * spread


def wanted_batch(variance: float, mean_square: float, eta: float) -> float:
    """Rows whose mean gradient passes the norm test: V / (eta^2 ||g||^2).

    Infinite where there is noise and no gradient; 0 where there is neither.
    """
    if variance == 0:
        return 0.0
    signal = eta**2 * float(mean_square)
    return variance / signal if signal > 0 else math.inf


class BatchState(NamedTuple):
    """State of a `BatchController`, to be saved with the position in the data.

    Attributes:
        wanted: rows that the tests so far have asked for, before rounding.
    """

    wanted: int


@dataclasses.dataclass(frozen=True)
class BatchController:
    """The batch of each step of a run, in accumulated micro-batches.

    Made by `BatchGrowth.build`. `jaxlab.training.train` obeys it (the field `growth` of
    its config). A loop of one's own starts from ``state = init()``, gives each step
    ``parts(state)`` micro-batches, and after it, or every few steps, calls
    ``state = update(state, ...)`` with what the step measured. One program is compiled
    for each power of two that is reached.

    Attributes:
        eta: largest noise of the mean gradient over its norm.
        smallest: rows of the first batch.
        largest: rows that no batch exceeds.
        micro_batch: rows that go through the model at once.
    """

    eta: float
    smallest: int
    largest: int
    micro_batch: int

    def init(self) -> BatchState:
        """The state before the first step."""
        return BatchState(self.smallest)

    def parts(self, state: BatchState) -> int:
        """Micro-batches of the next step, a power of two."""
        enough = -(-state.wanted // self.micro_batch)  # rounded up
        return 1 << (enough - 1).bit_length()

    def rows(self, state: BatchState) -> int:
        """Rows of the next step."""
        return self.parts(state) * self.micro_batch

    def update(
        self, state: BatchState, squares: float, mean_square: float, groups: int
    ) -> BatchState:
        """The state after the norm test of a step with ``rows(state)`` rows.

        Args:
            state: by which the step was made.
            squares: sum_j ||g_j||^2 over the groups, see `gradient_variance`.
            mean_square: ||g||^2 of the step's gradient.
            groups: J, the parts of the step, times the devices where each has its own.

        Raises:
            ValueError: as of `gradient_variance`.
        """
        variance = gradient_variance(squares, mean_square, groups, self.rows(state))
        wanted = min(wanted_batch(variance, mean_square, self.eta), self.largest)
        return BatchState(max(state.wanted, math.ceil(wanted)))


@dataclasses.dataclass(frozen=True)
class BatchGrowth:
    """Settings of a batch that grows by the norm test."""

    eta: float = 0.2  # largest noise of the mean gradient over its norm
    largest: int = 1024  # rows

    def build(self, batch_size: int, micro_batch: int) -> BatchController:
        """The controller of a run that starts with `batch_size` rows a step.

        Args:
            batch_size: rows of the first step, over all devices.
            micro_batch: rows that go through the model at once.

        Raises:
            ValueError: `eta` outside (0, 1), or batches that are no power of two of
                micro-batches.
        """
        if not 0 < self.eta < 1:
            raise ValueError(
                f"eta={self.eta} must be between 0 and 1: the noise of the mean "
                "gradient over its norm."
            )
        for name, rows in (("batch_size", batch_size), ("largest", self.largest)):
            parts, rest = divmod(rows, micro_batch)
            if rest or parts < 1 or parts & (parts - 1):
                raise ValueError(
                    f"{name}={rows} rows are not 1, 2, 4, 8, ... micro-batches of "
                    f"{micro_batch}; change one of them."
                )
        if batch_size > self.largest:
            raise ValueError(
                f"batch_size={batch_size} is above largest={self.largest}; a batch "
                "never shrinks."
            )
        return BatchController(self.eta, batch_size, self.largest, micro_batch)
