"""Stochastic gradient descent with momentum.

M <- momentum M + G,  W <- W - rate (M + decay W): weight decay is decoupled, as in
AdamW, and is not in the momentum.
"""

import dataclasses
from typing import Any

import optax

from jaxlab.optimizers.recipe import recipe
from jaxlab.optimizers.schedules import Schedule, WarmupCosine
from jaxlab.optimizers.settings import MEMORY, RECIPE, check

RANGES = {**RECIPE, "momentum": MEMORY}


@dataclasses.dataclass(frozen=True)
class SGD:
    """Settings of gradient descent with momentum."""

    learning_rate: float = 0.1  # at its peak
    schedule: Schedule = WarmupCosine()
    weight_decay: float = 1e-4  # multiplied by the learning rate
    momentum: float = 0.9  # share of the accumulated gradient kept at each step
    clip: float | None = 1.0  # largest global norm of the gradient; None: no clipping

    def __post_init__(self):
        check(RANGES, **vars(self))

    def build(self, specs: Any, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation for parameters `specs` and a run of `steps`.

        Reference: Polyak, "Some methods of speeding up the convergence of iteration
        methods", 1964.
        """

        def method(specs):
            del specs
            return optax.trace(self.momentum)

        return recipe(
            self.schedule.build(self.learning_rate, steps),
            specs,
            method,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )
