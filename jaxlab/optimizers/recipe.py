"""What the settings of the optimizers share: a clip, weight decay by role, a rate."""

from typing import Any, Protocol

import optax

from jaxlab.optimizers.schedules import Schedule
from jaxlab.params import select

DECAYED = [
    ("matrix", True),
    ("head", True),
    ("embedding", False),
    ("convolution", False),
    ("scale", False),
    ("bias", False),
    ("decay", False),
]
"""Roles that weight decay pulls to zero: matrices; not tables, filters and vectors."""


class Settings(Protocol):
    """Fields that `recipe` reads."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def clip(self) -> float: ...


def recipe(
    settings: Settings,
    specs: Any,
    steps: int,
    *scale: optax.GradientTransformation,
    after: tuple[optax.GradientTransformation, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Clip, `scale`, decay of the matrices, `after`, and the scheduled rate, in order.

    Args:
        settings: of the optimizer.
        specs: tree of `ParamSpec`.
        steps: of the run.
        scale: the method.
        after: what of it comes behind the decay.
    """
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        *scale,
        optax.add_decayed_weights(settings.weight_decay, select(specs, DECAYED)),
        *after,
        optax.scale_by_learning_rate(
            settings.schedule.build(settings.learning_rate, steps)
        ),
    )
