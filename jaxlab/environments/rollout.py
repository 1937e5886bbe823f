"""The interface of an environment, and episodes of a policy in it.

An environment has two pure functions of a single state, `reset` and `step`; `jax.vmap`
runs many at once. `step` returns `done` when the task itself ends; the limit
`max_steps` is applied by `episode`, and a step after `done` has no meaning.

An episode is a `jax.lax.while_loop`, which has no backward pass and needs none here.
Alone, it runs for as many steps as the episode has; under vmap, over a population, for
as many as the longest one, where a `jax.lax.scan` would always run for `max_steps`. A
weight that the whole population shares stays shared within the loop.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Policy = Callable[[Float[Array, " n"], Array], Array]
"""(observation, key) to an action."""


@dataclasses.dataclass(frozen=True)
class Box:
    """Actions that are vectors between bounds.

    Attributes:
        low: smallest value of each entry.
        high: largest value of each entry.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self):
        if len(self.low) != len(self.high) or not self.low:
            raise ValueError(
                f"low has {len(self.low)} entries and high {len(self.high)}; an action "
                "needs one of each for every entry, and at least one."
            )
        if not all(a < b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError(
                f"low is {self.low} and high {self.high}, but every entry of low must "
                "be below that of high."
            )

    @property
    def size(self) -> int:
        """The number of entries of an action."""
        return len(self.low)


class Step(NamedTuple):
    """The result of an action.

    Attributes:
        state: the next state.
        observation: the observation of the next state.
        reward: the reward of the action.
        done: whether the action ended the task.
    """

    state: Any
    observation: Float[Array, " n"]
    reward: Float[Array, ""]
    done: Bool[Array, ""]


class Environment(Protocol):
    """The interface that `episode` needs."""

    @property
    def observation_size(self) -> int:
        """The number of entries of an observation."""
        ...

    @property
    def actions(self) -> int | Box:
        """The number n of actions 0 to n - 1, or the bounds of an action vector."""
        ...

    @property
    def max_steps(self) -> int:
        """The largest number of steps in an episode."""
        ...

    def reset(self, key: Array) -> tuple[Any, Float[Array, " n"]]:
        """A first state, drawn from `key`, and its observation."""
        ...

    def step(self, state: Any, action: Array, key: Array) -> Step:
        """Take `action` in `state`; `key` draws whatever is random."""
        ...


class Episode(NamedTuple):
    """The result of an episode.

    Attributes:
        total: sum of the rewards.
        steps: number of steps.
        done: whether the task ended; False if the limit on steps ended the episode.
    """

    total: Float[Array, ""]
    steps: Int[Array, ""]
    done: Bool[Array, ""]


def episode(
    policy: Policy,
    environment: Environment,
    key: Array,
    *,
    max_steps: int | None = None,
) -> Episode:
    """Run one episode, up to `done` or the limit on steps, and sum the rewards.

    Args:
        policy: (observation, key) to an action.
        environment: the environment to act in.
        key: draws the first state and, folded with the number of the step, whatever is
            random in the policy and in the environment.
        max_steps: the limit; None for the environment's.

    Raises:
        ValueError: the limit is below 1.
    """
    limit = environment.max_steps if max_steps is None else max_steps
    if limit < 1:
        raise ValueError(f"max_steps is {limit}, but an episode has at least 1 step.")
    reset_key, step_key = jax.random.split(key)

    def unfinished(carry):
        _, _, so_far = carry
        return ~so_far.done & (so_far.steps < limit)

    def act(carry):
        state, observation, so_far = carry
        keys = jax.random.split(jax.random.fold_in(step_key, so_far.steps))
        action = policy(observation, keys[0])
        state, observation, reward, done = environment.step(state, action, keys[1])
        return (
            state,
            observation,
            Episode(so_far.total + reward, so_far.steps + 1, done),
        )

    empty = Episode(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    start = (*environment.reset(reset_key), empty)
    return jax.lax.while_loop(unfinished, act, start)[2]


def returns(
    policy: Policy,
    environment: Environment,
    key: Array,
    episodes: int,
    *,
    max_steps: int | None = None,
) -> Float[Array, " episodes"]:
    """Total rewards of several episodes with different keys; see `episode`."""

    def total(key):
        return episode(policy, environment, key, max_steps=max_steps).total

    return jax.vmap(total)(jax.random.split(key, episodes))


def angle(x: Float[Array, ""]) -> Float[Array, ""]:
    """Wrap an angle into [-pi, pi]."""
    return jnp.mod(x + math.pi, 2 * math.pi) - math.pi
