"""Environments of gymnax and brax, as those of this package.

    environment = Gymnax.make("CartPole-v1")
    environment = Brax.make("ant", backend="spring")

Both libraries start a new episode by themselves where one ends: gymnax within `step`,
brax by a wrapper of `brax.envs.create`. An episode here ends with it, so the adapters
call what lies beneath, gymnax's `reset_env` and `step_env`, which also have the same
results in all its versions, and `brax.envs.get_environment`. Observations become one
float32 vector.

The libraries are the extra `rl`, and imported only by `make`.
"""

import dataclasses
import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlab.environments.rollout import Box, Step


@dataclasses.dataclass(frozen=True, eq=False)
class Gymnax:
    """An environment of gymnax.

    Attributes:
        environment: with `reset_env`, `step_env` and `action_space`.
        parameters: its constants, such as `environment.default_params`.
    """

    environment: Any
    parameters: Any

    @classmethod
    def make(cls, name: str, **settings: Any) -> "Gymnax":
        """The registered environment `name`, with its default parameters.

        Raises:
            ImportError: gymnax is missing.
        """
        return cls(*_library("gymnax").make(name, **settings))

    @property
    def observation_size(self) -> int:
        """Entries of the observation, as one vector."""
        return _size(self.environment.reset_env, jax.random.key(0), self.parameters)

    @property
    def actions(self) -> int | Box:
        """How many there are, or the bounds of the entries.

        Raises:
            TypeError: the space is neither of the two.
        """
        space = self.environment.action_space(self.parameters)
        if hasattr(space, "n"):
            return int(space.n)
        if not hasattr(space, "low"):
            raise TypeError(
                f"The actions are {space}, but only a space of numbered actions or one "
                "box of bounded entries can be acted in; wrap the environment in one "
                "that has such actions."
            )
        bounds = (np.broadcast_to(b, space.shape) for b in (space.low, space.high))
        return Box(*(tuple(b.ravel().tolist()) for b in bounds))

    @property
    def max_steps(self) -> int:
        """The library's own limit."""
        return int(self.parameters.max_steps_in_episode)

    def reset(self, key: Array) -> tuple[Any, Float[Array, " n"]]:
        """A first state and its observation."""
        observation, state = self.environment.reset_env(key, self.parameters)
        return state, _vector(observation)

    def step(self, state: Any, action: Array, key: Array) -> Step:
        """What follows an action, a number or a vector as `actions` says."""
        space = self.environment.action_space(self.parameters)
        observation, state, reward, done, _ = self.environment.step_env(
            key, state, action.reshape(space.shape), self.parameters
        )
        return _step(state, observation, reward, done)


@dataclasses.dataclass(frozen=True, eq=False)
class Brax:
    """An environment of brax.

    Attributes:
        environment: with `reset`, `step` and `action_size`.
        max_steps: limit of an episode.
    """

    environment: Any
    max_steps: int = 1000

    @classmethod
    def make(cls, name: str, max_steps: int = 1000, **settings: Any) -> "Brax":
        """The registered environment `name`.

        Raises:
            ImportError: brax is missing.
        """
        return cls(_library("brax.envs").get_environment(name, **settings), max_steps)

    @property
    def observation_size(self) -> int:
        """Entries of the observation, as one vector."""

        def first(key):
            return (self.environment.reset(key).obs,)

        return _size(first, jax.random.key(0))

    @property
    def actions(self) -> Box:
        """Entries between -1 and 1."""
        n = self.environment.action_size
        return Box((-1.0,) * n, (1.0,) * n)

    def reset(self, key: Array) -> tuple[Any, Float[Array, " n"]]:
        """A first state and its observation."""
        state = self.environment.reset(key)
        return state, _vector(state.obs)

    def step(self, state: Any, action: Float[Array, " k"], key: Array) -> Step:
        """What follows an action; nothing in it is random."""
        state = self.environment.step(state, action)
        return _step(state, state.obs, state.reward, state.done)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} cannot be imported ({error}). It belongs to the extra `rl`: "
            "install it with pip install -e '.[rl]'."
        ) from error


def _size(first: Any, *arguments: Any) -> int:
    """Entries of the observation that `first` returns before all else."""
    observation = jax.eval_shape(first, *arguments)[0]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(observation))


def _vector(observation: Any) -> Float[Array, " n"]:
    leaves = [jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(observation)]
    return jnp.concatenate(leaves)


def _step(state: Any, observation: Any, reward: Any, done: Any) -> Step:
    reward = jnp.asarray(reward).astype(jnp.float32).reshape(())
    return Step(state, _vector(observation), reward, jnp.asarray(done).astype(bool))
