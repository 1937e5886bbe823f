"""Leaving a costly transformation once it stops paying: the switch of MKOR-H.

Two averages of the loss, a fast and a slow one, each m <- beta m + (1 - beta) loss
without its bias to 0, say by which share the loss has lately fallen:

    rate = (slow - fast) / |slow|

Where the rate is below `least` for `patience` steps in a row, gradients pass unchanged
from the next step on, and that step is remembered.

Differs from the paper in: the paper names a switch to first order by the rate at which
the loss decreases, but gives no formula, and the released code has none that works by
itself; this rule is ours.

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

STAYS = -1
RANGES = {
    "least": Range("finite", "it is the share by which the loss falls in a step"),
    "patience": PERIOD,
    "warmup": STEPS,
}


@dataclasses.dataclass(frozen=True)
class Switch:
    """When to leave."""

    fast: float = 0.9  # beta of the fast average
    slow: float = 0.99  # beta of the slow average
    least: float = 1e-3  # rate that pays
    patience: int = 20  # steps in a row below it
    warmup: int = 100  # steps before they count

    def __post_init__(self):
        check(RANGES, **vars(self))
        if not 0 <= self.fast < self.slow < 1:
            raise ValueError(
                f"fast={self.fast} and slow={self.slow} must be in [0, 1), fast below "
                "slow: a greater one remembers longer."
            )


class SwitchState(NamedTuple):
    """State of `while_it_pays`.

    Attributes:
        inner: of the transformation.
        step: steps made.
        count: finite losses seen.
        averages: fast and slow, not yet divided by what they lack at the start.
        below: steps in a row whose rate was below `least`.
        left_at: steps made with it when it was left; -1 as long as it is not.
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
    """`inner` until the loss stops falling fast enough; then gradients unchanged.

    `update` takes the loss as ``value``. A loss that is not finite is not counted.

    Raises:
        ValueError: `update` without ``value``.
    """
    wrapped = optax.with_extra_args_support(inner)
    betas = np.array([switch.fast, switch.slow], np.float32)

    def init(params: Any) -> SwitchState:
        # A buffer each: a step may donate them.
        step, count, below = (jnp.zeros((), jnp.int32) for _ in range(3))
        left_at = jnp.full((), STAYS, jnp.int32)
        averages = jnp.zeros(2, jnp.float32)
        inner_state = wrapped.init(params)
        return SwitchState(inner_state, step, count, averages, below, left_at)

    def update(updates, state: Any, params=None, *, value=None, **extra):
        if value is None:
            raise ValueError(
                "The switch goes by the loss: call update(..., value=loss)."
            )
        stays = state.left_at == STAYS
        updates, own = jax.lax.cond(
            stays,
            lambda: wrapped.update(updates, state.inner, params, value=value, **extra),
            lambda: (updates, state.inner),
        )
        seen = jnp.isfinite(value)
        count = state.count + seen.astype(jnp.int32)
        mixed = betas * state.averages + (1 - betas) * jnp.asarray(value, jnp.float32)
        averages = jnp.where(seen, mixed, state.averages)
        whole = 1 - betas ** count.astype(jnp.float32)
        fast, slow = averages / jnp.where(count > 0, whole, 1.0)
        poor = (slow - fast < switch.least * jnp.abs(slow)) & (count > switch.warmup)
        below = jnp.where(seen, jnp.where(poor, state.below + 1, 0), state.below)
        leaves = stays & (below >= switch.patience)
        step = state.step + 1
        left_at = jnp.where(leaves, step, state.left_at)
        return updates, SwitchState(own, step, count, averages, below, left_at)

    return optax.GradientTransformationExtraArgs(init, update)


def left_at(state: Any) -> int | None:
    """Steps made with the inner transformation when it was left; None if it was not.

    The switch may be anywhere in the state.

    Raises:
        ValueError: no switch, or several, in the state.
    """

    def is_switch(node):
        return isinstance(node, SwitchState)

    switches = [x for x in jax.tree.leaves(state, is_leaf=is_switch) if is_switch(x)]
    if len(switches) != 1:
        raise ValueError(
            f"The state holds {len(switches)} switches, but one is asked for."
        )
    step = int(switches[0].left_at)
    return None if step == STAYS else step
