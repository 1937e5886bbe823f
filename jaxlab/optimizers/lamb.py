"""LAMB: Adam's update, rescaled to the norm of the weights layer by layer.

With A as Adam's update of one layer's weight W,

    U = A + decay W,    W <- W - rate U ||W|| / ||U||,

where the ratio is 1 if either norm is 0, such as for a bias that starts at 0.

Differs from the paper in: the norm of the weights is not clipped. Differs from
`optax.lamb` in: each layer of a stacked weight has its own ratio, as in the paper,
where optax computes one for the whole stack.

Reference: You et al., Large Batch Optimization for Deep Learning: Training BERT in 76
minutes, arXiv 1904.00962.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlab.optimizers.recipe import from_settings, recipe
from jaxlab.optimizers.schedules import Schedule, WarmupCosine
from jaxlab.optimizers.settings import MEMORY, POSITIVE, RECIPE, check
from jaxlab.optimizers.trees import with_specs
from jaxlab.params import ParamSpec

RANGES = {**RECIPE, "b1": MEMORY, "b2": MEMORY, "eps": POSITIVE}


def scale_by_layer_norms(
    specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescale updates to the norms of the weights, for each layer of a stack.

    Args:
        specs: tree of `ParamSpec`; None derives the roles from the arrays, as
            `jaxlab.params.infer` does.

    Raises:
        ValueError: `update` gets no parameters, or trees that differ in a leaf.
    """
    needs_params = "LAMB rescales updates to the norms of the parameters"
    return with_specs(specs, _scale_by_layer_norms, needs_params)


def _scale_by_layer_norms(specs: Any) -> optax.GradientTransformationExtraArgs:
    def scaled(spec: ParamSpec, u, w):
        axes = _axes_within_a_layer(spec)
        norm_u, norm_w = (
            jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2, axis=axes, keepdims=True))
            for x in (u, w)
        )
        both = (norm_u > 0) & (norm_w > 0)
        ratio = jnp.where(both, norm_w / jnp.where(both, norm_u, 1.0), 1.0)
        return (ratio * u.astype(jnp.float32)).astype(u.dtype)

    def update(updates, state, params=None, **_):
        return jax.tree.map(scaled, specs, updates, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def lamb(
    learning_rate: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    clip: float | None = None,
    specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """LAMB on any pytree: W <- W - rate U ||W|| / ||U||, U = Adam's update + decay W.

    Args:
        learning_rate: a number or a schedule: the norm of a step over the norm of the
            weights.
        b1: decay rate of the mean gradient.
        b2: decay rate of the mean square.
        eps: added to the root of the mean square.
        weight_decay: share of the weights added to Adam's update before the norms are
            computed; only for the roles "matrix" and "head".
        clip: largest global norm of the gradient; None for no clipping.
        specs: tree of `ParamSpec`; None derives the roles from the arrays, as
            `jaxlab.params.infer` does.

    Returns:
        A transformation whose `update` also takes the parameters.

    Raises:
        ValueError: a setting is outside its range; or, from `init` and `update`, trees
            differ in a leaf, which the message names.

    Reference: You et al., arXiv 1904.00962.
    """
    check(RANGES, b1=b1, b2=b2, eps=eps)

    def method(specs):
        del specs
        return optax.scale_by_adam(b1, b2, eps)

    return recipe(
        learning_rate,
        specs,
        method,
        weight_decay=weight_decay,
        clip=clip,
        after=_scale_by_layer_norms,
    )


def _axes_within_a_layer(spec: ParamSpec) -> tuple[int, ...]:
    if spec.role == "matrix":
        return (-2, -1)
    return tuple(i for i, axis in enumerate(spec.axes) if axis != "layers")


@dataclasses.dataclass(frozen=True)
class LAMB:
    """Settings of LAMB."""

    learning_rate: float = 3e-3  # at its peak: norm of a step over the weights' norm
    schedule: Schedule = WarmupCosine()
    weight_decay: float = 0.01  # share of the weights added to Adam's update
    b1: float = 0.9  # decay rate of the mean gradient
    b2: float = 0.999  # decay rate of the mean square
    eps: float = 1e-6
    clip: float | None = 1.0  # largest global norm of the gradient; None: no clipping

    def __post_init__(self):
        check(RANGES, **vars(self))

    def build(self, specs: Any, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation for parameters `specs` and a run of `steps`."""
        return from_settings(lamb, self, specs, steps)
