"""Adapters for the environments of gymnax and brax.

    environment = Gymnax.make("CartPole-v1")
    environment = Brax.make("ant", backend="spring")

Both libraries start a new episode when one ends: gymnax within `step`, brax in a
wrapper from `brax.envs.create`. An episode of this package ends instead, so the
adapters call the functions underneath: gymnax's `reset_env` and `step_env`, whose
results are also the same in all its versions, and `brax.envs.get_environment`.
Observations become one float32 vector.

Both libraries belong to the extra `rl` and are imported only by `make`.
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
        environment: an object with `reset_env`, `step_env` and `action_space`.
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
        """The number of entries of the observation, as one vector."""
        return _size(self.environment.reset_env, jax.random.key(0), self.parameters)

    @property
    def actions(self) -> int | Box:
        """The number of actions, or the bounds of an action's entries.

        Raises:
            TypeError: the action space is neither discrete nor one box.
        """
        space = self.environment.action_space(self.parameters)
        if hasattr(space, "n"):
            return int(space.n)
        if not hasattr(space, "low"):
            raise TypeError(
                f"The action space is {space}, but it must be discrete or one box; "
                "wrap the environment in one with such a space."
            )
        bounds = (np.broadcast_to(b, space.shape) for b in (space.low, space.high))
        return Box(*(tuple(b.ravel().tolist()) for b in bounds))

    @property
    def max_steps(self) -> int:
        """The limit in gymnax's parameters."""
        return int(self.parameters.max_steps_in_episode)

    def reset(self, key: Array) -> tuple[Any, Float[Array, " n"]]:
        """A first state and its observation."""
        observation, state = self.environment.reset_env(key, self.parameters)
        return state, _vector(observation)

    def step(self, state: Any, action: Array, key: Array) -> Step:
        """Take an action, a number or a vector as given by `actions`."""
        space = self.environment.action_space(self.parameters)
        observation, state, reward, done, _ = self.environment.step_env(
            key, state, action.reshape(space.shape), self.parameters
        )
        return _step(state, observation, reward, done)


@dataclasses.dataclass(frozen=True, eq=False)
class Brax:
    """An environment of brax.

    Attributes:
        environment: an object with `reset`, `step` and `action_size`.
        max_steps: largest number of steps in an episode.
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
        """The number of entries of the observation, as one vector."""

        def reset(key):
            return (self.environment.reset(key).obs,)

        return _size(reset, jax.random.key(0))

    @property
    def actions(self) -> Box:
        """Vectors with entries between -1 and 1."""
        n = self.environment.action_size
        return Box((-1.0,) * n, (1.0,) * n)

    def reset(self, key: Array) -> tuple[Any, Float[Array, " n"]]:
        """A first state and its observation."""
        state = self.environment.reset(key)
        return state, _vector(state.obs)

    def step(self, state: Any, action: Float[Array, " k"], key: Array) -> Step:
        """Take an action; nothing is random, so `key` is not used."""
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


def _size(reset: Any, *arguments: Any) -> int:
    """The number of entries of the observation that `reset` returns first."""
    observation = jax.eval_shape(reset, *arguments)[0]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(observation))


def _vector(observation: Any) -> Float[Array, " n"]:
    leaves = [jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(observation)]
    return jnp.concatenate(leaves)


def _step(state: Any, observation: Any, reward: Any, done: Any) -> Step:
    reward = jnp.asarray(reward).astype(jnp.float32).reshape(())
    return Step(state, _vector(observation), reward, jnp.asarray(done).astype(bool))
