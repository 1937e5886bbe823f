"""What a task gives the loop of `run`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxlab.training.state import TrainState


class Problem(NamedTuple):
    """A task made ready.

    Attributes:
        state: before the first step; `opt_state` is the method's own.
        step: (state, number of the step from 0) to the next state and figures. A pure
            function, so that a run goes on where its checkpoint ends.
        score: figures of the state's parameters by themselves.
        headline: what is searched, and how.
        train, held_out: the figure of `step` and that of `score` that are drawn.
        unit: theirs.
        greater: whether more of it is better.
        baselines: levels to draw beside them.
    """

    state: TrainState
    step: Callable[[TrainState, int], tuple[TrainState, dict[str, Array]]]
    score: Callable[[TrainState], dict[str, float]]
    headline: str
    train: str
    held_out: str
    unit: str
    greater: bool = True
    baselines: dict[str, float] = {}


def compiled(
    update: Callable[..., tuple[TrainState, Any]], state: TrainState
) -> tuple[Callable[..., tuple[TrainState, Any]], TrainState]:
    """An update that leaves the state on the devices as it found it, and the state.

    So that the first step's program is that of all. What is on no mesh yet is copied to
    all devices of the one in use.
    """
    whole = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())

    def placed(x: Array) -> Array:
        on_a_mesh = isinstance(x.sharding, NamedSharding)
        return x if on_a_mesh else jax.device_put(x, whole)

    state = jax.tree.map(placed, state)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(update, out_shardings=(shardings, None)), state
