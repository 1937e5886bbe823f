"""The recipe that optimizers share: a clip, weight decay by role, a rate."""

from collections.abc import Callable
from typing import Any

import optax

from jaxlab.optimizers.settings import RECIPE, check
from jaxlab.optimizers.trees import with_specs
from jaxlab.params import select

Method = Callable[[Any], optax.GradientTransformation]
"""From specs, laid out like the parameters, to a transformation."""

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


def recipe(
    learning_rate: float | optax.Schedule,
    specs: Any,
    scale: Method,
    *,
    weight_decay: float,
    clip: float | None,
    after: Method | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clip, `scale`, decay of the matrices, `after`, and the rate, on any pytree.

    Args:
        learning_rate: a number or a schedule.
        specs: tree of `ParamSpec`; None derives them from the arrays, see `with_specs`.
        scale: the method.
        weight_decay: share of the weights of the roles in `DECAYED`, times the rate.
        clip: largest norm of the whole gradient; None for no clipping.
        after: what of the method comes behind the decay.

    Raises:
        ValueError: a rate, decay or clip outside its range.
    """
    check(RECIPE, learning_rate=learning_rate, weight_decay=weight_decay, clip=clip)

    def make(specs):
        parts = [scale(specs)]
        parts.append(optax.add_decayed_weights(weight_decay, select(specs, DECAYED)))
        if after is not None:
            parts.append(after(specs))
        rate = optax.scale_by_learning_rate(learning_rate)
        return optax.chain(clipped(clip), *parts, rate)

    return with_specs(specs, make)


def from_settings(
    method: Callable[..., optax.GradientTransformationExtraArgs],
    settings: Any,
    specs: Any,
    steps: int,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of a settings class.

    Args:
        method: the function of the class, such as `soap`, which takes the fields as
            arguments.
        settings: its fields, with a ``learning_rate`` and the ``schedule`` of it.
        specs: of the parameters.
        steps: of the run.
    """
    fields = dict(vars(settings))
    rate = fields.pop("schedule").build(fields.pop("learning_rate"), steps)
    return method(rate, **fields, specs=specs)


def clipped(clip: float | None) -> optax.GradientTransformation:
    """Clipping by the norm of the whole gradient, or nothing for None."""
    return optax.identity() if clip is None else optax.clip_by_global_norm(clip)
