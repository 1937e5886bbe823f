"""AdamW with a schedule, clipping, and weight decay by the parameters' roles."""

import dataclasses
from typing import Any

import optax

from jaxlab.optimizers.recipe import DECAYED, NEEDS_PARAMS, clipped
from jaxlab.optimizers.schedules import Schedule, WarmupCosine
from jaxlab.optimizers.settings import MEMORY, POSITIVE, RECIPE, check
from jaxlab.optimizers.trees import with_specs
from jaxlab.params import select

RANGES = {**RECIPE, "b1": MEMORY, "b2": MEMORY, "eps": POSITIVE}


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Settings of AdamW."""

    learning_rate: float = 3e-3  # at its peak
    schedule: Schedule = WarmupCosine()
    weight_decay: float = 0.1  # multiplied by the learning rate
    b1: float = 0.9  # decay rate of the mean gradient
    b2: float = 0.95  # decay rate of the mean square
    eps: float = 1e-8
    clip: float | None = 1.0  # largest global norm of the gradient; None: no clipping

    def __post_init__(self):
        check(RANGES, **vars(self))

    def build(self, specs: Any, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation for parameters `specs` and a run of `steps`.

        Reference: Loshchilov and Hutter, "Decoupled Weight Decay Regularization",
        arXiv 1711.05101.
        """

        def make(specs):
            return optax.chain(
                clipped(self.clip),
                optax.adamw(
                    self.schedule.build(self.learning_rate, steps),
                    b1=self.b1,
                    b2=self.b2,
                    eps=self.eps,
                    weight_decay=self.weight_decay,
                    mask=select(specs, DECAYED),
                ),
            )

        return with_specs(specs, make, NEEDS_PARAMS)
