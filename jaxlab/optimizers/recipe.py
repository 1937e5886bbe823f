"""The recipe that optimizers share: clipping, weight decay by role, learning rate."""

from collections.abc import Callable
from typing import Any

import optax

from jaxlab.optimizers.settings import RECIPE, check
from jaxlab.optimizers.trees import with_specs
from jaxlab.params import select

Method = Callable[[Any], optax.GradientTransformation]
"""A function from specs, in the structure of the parameters, to a transformation."""

DECAYED = [
    ("matrix", True),
    ("head", True),
    ("embedding", False),
    ("convolution", False),
    ("scale", False),
    ("bias", False),
    ("decay", False),
]
"""Whether weight decay applies to a role: matrices, not tables, filters or vectors."""

NEEDS_PARAMS = "Weight decay takes a share of the parameters"


def recipe(
    learning_rate: float | optax.Schedule,
    specs: Any,
    scale: Method,
    *,
    weight_decay: float,
    clip: float | None,
    after: Method | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Chain clipping, `scale`, weight decay, `after` and the rate, for any pytree.

    Args:
        learning_rate: a number or a schedule.
        specs: tree of `ParamSpec`; None derives them from the arrays, see `with_specs`.
        scale: builds the method's own transformation.
        weight_decay: share of the weights subtracted at each step, times the learning
            rate; for the roles that `DECAYED` allows.
        clip: largest global norm of the gradient; None for no clipping.
        after: builds the part of the method that follows weight decay, if any.

    Raises:
        ValueError: a learning rate, decay or clip is outside its range.
    """
    check(RECIPE, learning_rate=learning_rate, weight_decay=weight_decay, clip=clip)

    def make(specs):
        parts = [scale(specs)]
        parts.append(optax.add_decayed_weights(weight_decay, select(specs, DECAYED)))
        if after is not None:
            parts.append(after(specs))
        rate = optax.scale_by_learning_rate(learning_rate)
        return optax.chain(clipped(clip), *parts, rate)

    return with_specs(specs, make, NEEDS_PARAMS)


def from_settings(
    method: Callable[..., optax.GradientTransformationExtraArgs],
    settings: Any,
    specs: Any,
    steps: int,
) -> optax.GradientTransformationExtraArgs:
    """Build the transformation of a settings class.

    Args:
        method: the optimizer's function, such as `soap`, which takes the fields of the
            settings as arguments.
        settings: an instance of the class, with a ``learning_rate`` and its
            ``schedule``.
        specs: tree of `ParamSpec`.
        steps: number of steps in the run.
    """
    fields = dict(vars(settings))
    rate = fields.pop("schedule").build(fields.pop("learning_rate"), steps)
    return method(rate, **fields, specs=specs)


def clipped(clip: float | None) -> optax.GradientTransformation:
    """Clip by the global norm of the gradient; do nothing for None."""
    return optax.identity() if clip is None else optax.clip_by_global_norm(clip)
