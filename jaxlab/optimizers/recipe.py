"""The recipe that optimizers share: a clip, weight decay by role, a rate."""

from typing import Any

import optax

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


def recipe(
    learning_rate: float | optax.Schedule,
    specs: Any,
    *scale: optax.GradientTransformation,
    weight_decay: float,
    clip: float | None,
    after: tuple[optax.GradientTransformation, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Clip, `scale`, decay of the matrices, `after`, and the rate, in order.

    Args:
        learning_rate: a number or a schedule.
        specs: tree of `ParamSpec`, laid out like the parameters.
        scale: the method.
        weight_decay: share of the weights of the roles in `DECAYED`, times the rate.
        clip: largest norm of the whole gradient; None for no clipping.
        after: what of the method comes behind the decay.
    """
    return optax.chain(
        clipped(clip),
        *scale,
        optax.add_decayed_weights(weight_decay, select(specs, DECAYED)),
        *after,
        optax.scale_by_learning_rate(learning_rate),
    )


def clipped(clip: float | None) -> optax.GradientTransformation:
    """Clipping by the norm of the whole gradient, or nothing for None."""
    return optax.identity() if clip is None else optax.clip_by_global_norm(clip)
