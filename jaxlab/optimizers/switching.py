"""Leaving a costly transformation once it stops paying: the switch of MKOR-H.

A fast and a slow average of the loss, each m <- beta m + (1 - beta) loss with bias
correction, show the share by which the loss has fallen lately:

    rate = (slow - fast) / |slow|

Once the rate has been below `least` for `patience` steps in a row, gradients pass
unchanged from the next step on, and the state records when.

Differs from the paper in: the paper mentions a switch to first order by the rate at
which the loss decreases, but gives no formula, and the released code has no automatic
switch. This rule is ours.

Reference: Mozaffari et al., MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer
Using Rank-1 Updates, arXiv 2306.01685.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxlab.optimizers.settings import PERIOD, STEPS, Range, check
from jaxlab.optimizers.trees import checked, kind_of

STAYS = -1
RANGES = {
    "least": Range("finite", "it is the share by which the loss falls in a step"),
    "patience": PERIOD,
    "warmup": STEPS,
}


@dataclasses.dataclass(frozen=True)
class Switch:
    """When to leave the transformation."""

    fast: float = 0.9  # beta of the fast average
    slow: float = 0.99  # beta of the slow average
    least: float = 1e-3  # smallest rate that pays
    patience: int = 20  # steps in a row below `least` before it leaves
    warmup: int = 100  # first steps, which do not count

    def __post_init__(self):
        check(RANGES, **vars(self))
        if not 0 <= self.fast < self.slow < 1:
            raise ValueError(
                f"fast={self.fast} and slow={self.slow} must be in [0, 1), with fast "
                "below slow: the average with the larger one changes more slowly."
            )


class SwitchState(NamedTuple):
    """State of `while_it_pays`.

    Attributes:
        inner: state of the transformation.
        step: steps made.
        count: finite losses seen.
        averages: the fast and the slow average, before bias correction.
        below: steps in a row whose rate was below `least`.
        left_at: steps made with the transformation when it was left; -1 before that.
    """

    inner: Any
    step: Int[Array, ""]
    count: Int[Array, ""]
    averages: Float[Array, " 2"]
    below: Int[Array, ""]
    left_at: Int[Array, ""]

    EVENTS = {
        "left_at": "the loss falls too slowly: the switch leaves its transformation "
        "(MKOR's factors)"
    }


def while_it_pays(
    inner: optax.GradientTransformation, switch: Switch = Switch()
) -> optax.GradientTransformationExtraArgs:
    """Apply `inner` until the loss stops falling fast enough, then nothing.

    `update` takes the loss as ``value``. A loss that is not finite is ignored.

    Raises:
        ValueError: `update` gets no ``value``, or one with axes; or as by `checked`.
        TypeError: ``value`` is no number, or a leaf no array.
    """
    if not isinstance(switch, Switch):
        raise TypeError(f"switch={switch!r} must be a Switch: Switch().")
    wrapped = optax.with_extra_args_support(inner)
    betas = np.array([switch.fast, switch.slow], np.float32)

    def init(params: Any) -> SwitchState:
        # One buffer for each counter: a step may donate them.
        step, count, below = (jnp.zeros((), jnp.int32) for _ in range(3))
        left_at = jnp.full((), STAYS, jnp.int32)
        averages = jnp.zeros(2, jnp.float32)
        inner_state = wrapped.init(params)
        return SwitchState(inner_state, step, count, averages, below, left_at)

    def update(updates, state: Any, params=None, *, value=None, **extra):
        value = _check_loss(value)
        stays = state.left_at == STAYS

        def apply():
            u, inner = wrapped.update(
                updates, state.inner, params, value=value, **extra
            )
            return jax.tree.map(lambda u, g: u.astype(g.dtype), u, updates), inner

        updates, inner_state = jax.lax.cond(
            stays, apply, lambda: (updates, state.inner)
        )
        seen = jnp.isfinite(value)
        count = state.count + seen.astype(jnp.int32)
        loss = jnp.asarray(value, jnp.float32)
        new = betas * state.averages + (1 - betas) * loss
        averages = jnp.where(seen, new, state.averages)
        correction = 1 - betas ** count.astype(jnp.float32)
        fast, slow = averages / jnp.where(count > 0, correction, 1.0)
        poor = (slow - fast < switch.least * jnp.abs(slow)) & (count > switch.warmup)
        below = jnp.where(seen, jnp.where(poor, state.below + 1, 0), state.below)
        leaves = stays & (below >= switch.patience)
        step = state.step + 1
        left_at = jnp.where(leaves, step, state.left_at)
        return updates, SwitchState(inner_state, step, count, averages, below, left_at)

    return checked(optax.GradientTransformationExtraArgs(init, update))


def _check_loss(value: Any) -> Any:
    """Return the loss if it is one real number."""
    if value is None:
        raise ValueError(
            "The switch depends on the loss: call update(..., value=loss)."
        )
    kind = kind_of(value)
    numbers = (jnp.floating, jnp.integer)
    if kind is None or not any(jnp.issubdtype(kind.dtype, x) for x in numbers):
        raise TypeError(
            f"value is {kind or f'of type {type(value).__name__}'}, but it must be the "
            "loss, a real number."
        )
    if kind.shape:
        raise ValueError(
            f"value has shape {kind.shape}, but the loss is one number; give its mean."
        )
    return value


def left_at(state: Any) -> int | None:
    """Return the steps made with the transformation when it was left, or None.

    The switch may be anywhere in the state.

    Raises:
        ValueError: the state has no switch, or several.
    """

    def is_switch(node):
        return isinstance(node, SwitchState)

    switches = [x for x in jax.tree.leaves(state, is_leaf=is_switch) if is_switch(x)]
    if len(switches) != 1:
        raise ValueError(
            f"The state holds {len(switches)} switches; give a state with exactly one."
        )
    step = int(switches[0].left_at)
    return None if step == STAYS else step
