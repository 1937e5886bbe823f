"""What an environment is, and the episodes of a policy in it.

An environment is a value with two pure functions of one environment, `reset` and
`step`; `jax.vmap` makes many of it. `step` says `done` where the task itself ends; the
limit `max_steps` is the episode's affair, and a step after `done` means nothing.

An episode is a `jax.lax.while_loop`, which has no backward pass and needs none here. By
itself it takes as many steps as it lasts; under vmap, over a population, as many as the
longest, where a `jax.lax.scan` would take `max_steps` always. A weight that the whole
population shares stays shared within the loop.
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
        """Entries of an action."""
        return len(self.low)


class Step(NamedTuple):
    """What follows an action.

    Attributes:
        state: the next.
        observation: of the next state.
        reward: for the action.
        done: whether the task ended with it.
    """

    state: Any
    observation: Float[Array, " n"]
    reward: Float[Array, ""]
    done: Bool[Array, ""]


class Environment(Protocol):
    """What `episode` needs of an environment."""

    @property
    def observation_size(self) -> int:
        """Entries of an observation."""
        ...

    @property
    def actions(self) -> int | Box:
        """How many actions there are, 0 to n - 1; or the bounds of a vector."""
        ...

    @property
    def max_steps(self) -> int:
        """Steps after which an episode ends in any case."""
        ...

    def reset(self, key: Array) -> tuple[Any, Float[Array, " n"]]:
        """A first state, drawn from `key`, and its observation."""
        ...

    def step(self, state: Any, action: Array, key: Array) -> Step:
        """What follows `action` in `state`; `key` is for what is random in it."""
        ...


class Episode(NamedTuple):
    """What became of an episode.

    Attributes:
        total: sum of its rewards.
        steps: how many it took.
        done: whether the task ended; False where the limit of steps ended it.
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
    """One episode: the sum of the rewards up to `done` or the limit of steps.

    Args:
        policy: (observation, key) to an action.
        environment: its `reset` and `step` are called.
        key: draws the first state and, with the number of the step, what is random in
            the policy and in the environment.
        max_steps: another limit than the environment's.

    Raises:
        ValueError: a limit below 1.
    """
    limit = environment.max_steps if max_steps is None else max_steps
    if limit < 1:
        raise ValueError(f"max_steps is {limit}, but an episode has at least 1 step.")
    of_reset, of_steps = jax.random.split(key)

    def goes_on(carry):
        _, _, so_far = carry
        return ~so_far.done & (so_far.steps < limit)

    def act(carry):
        state, observation, so_far = carry
        keys = jax.random.split(jax.random.fold_in(of_steps, so_far.steps))
        action = policy(observation, keys[0])
        state, observation, reward, done = environment.step(state, action, keys[1])
        return (
            state,
            observation,
            Episode(so_far.total + reward, so_far.steps + 1, done),
        )

    nothing = Episode(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    start = (*environment.reset(of_reset), nothing)
    return jax.lax.while_loop(goes_on, act, start)[2]


def returns(
    policy: Policy,
    environment: Environment,
    key: Array,
    episodes: int,
    *,
    max_steps: int | None = None,
) -> Float[Array, " episodes"]:
    """Total rewards of episodes with different keys; the rest as `episode`."""

    def total(key):
        return episode(policy, environment, key, max_steps=max_steps).total

    return jax.vmap(total)(jax.random.split(key, episodes))


def angle(x: Float[Array, ""]) -> Float[Array, ""]:
    """The same angle in [-pi, pi], for the environments that need it."""
    return jnp.mod(x + math.pi, 2 * math.pi) - math.pi
