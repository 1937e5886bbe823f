"""One update of a training state, compiled."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array

from jaxlab.objectives import Objective, gradient_step
from jaxlab.optimizers import reported
from jaxlab.training.state import TrainState, abstract_state


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    tapped: Any = None,
    trainable: Any = None,
) -> Callable[[TrainState, Any, Array], tuple[TrainState, dict[str, Array]]]:
    """The jitted function ``(state, batch, key) -> (state, metrics)``.

    It donates the state. Made under the mesh in use; a step leaves the state on the
    devices as `create_state` puts it, so that one program serves all steps.

    Args:
        objective: what is learned, see `jaxlab.objectives`.
        optimizer: takes the gradients of its loss.
        accumulate, tapped, trainable: as in
            `jaxlab.objectives.gradient_step`, whose metrics come with what the
            optimizer's state reports (`jaxlab.optimizers.reported`).
    """
    state = abstract_state(objective.spec(), optimizer, jax.sharding.get_mesh())
    shardings = jax.tree.map(lambda x: x.sharding, state)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state: TrainState, batch, key):
        params, opt_state, metrics = gradient_step(
            objective,
            optimizer,
            state.params,
            state.opt_state,
            batch,
            key,
            accumulate=accumulate,
            tapped=tapped,
            trainable=trainable,
        )
        return (
            TrainState(state.step + 1, params, opt_state),
            metrics | reported(opt_state),
        )

    return train_step
