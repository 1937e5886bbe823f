"""The adapters on small stand-ins with the signatures of gymnax 1.0 and brax 0.14."""

import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxlab.environments import Box, Brax, Gymnax, episode

KEY = jax.random.key(2)


@struct.dataclass
class Params:
    max_steps_in_episode: int = 30
    speed: float = 0.5


@struct.dataclass
class GymnaxState:
    x: jax.Array
    time: int


class GymnaxWalk:
    """Walks from the origin until |x| is 2 or more; `step` begins anew by itself."""

    default_params = Params()

    def __init__(self, space):
        self.space = space

    def action_space(self, params):
        return self.space

    def observe(self, state):
        return {"image": jnp.full((2, 3), state.x), "time": jnp.asarray(state.time)}

    def reset_env(self, key, params):
        state = GymnaxState(0.1 * jax.random.uniform(key), 0)
        return self.observe(state), state

    def step_env(self, key, state, action, params):
        assert action.shape == self.space.shape
        state = GymnaxState(
            state.x + params.speed * jnp.sum(action.astype(jnp.float32)), state.time + 1
        )
        done = jnp.abs(state.x) >= 2
        return self.observe(state), state, jnp.int32(3), done, {"discount": 1.0}

    def step(self, key, state, action, params=None):
        raise AssertionError("begins a new episode, which none has asked for")

    reset = step


@struct.dataclass
class BraxState:
    pipeline_state: Any
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    metrics: dict
    info: dict


class BraxWalk:
    """The same walk, with the signatures of brax."""

    action_size = 2

    def reset(self, rng):
        zero = jnp.zeros(())
        return BraxState(jax.random.uniform(rng), jnp.zeros(5), zero, zero, {}, {})

    def step(self, state, action):
        x = state.pipeline_state + 0.5 * action.sum()
        done = jnp.where(jnp.abs(x) >= 2, 1.0, 0.0)
        return state.replace(
            pipeline_state=x, obs=jnp.full(5, x), reward=action[0], done=done
        )


NUMBERED = SimpleNamespace(n=4, shape=())
BOUNDED = SimpleNamespace(low=jnp.asarray([-1.0, -3.0]), high=2.0, shape=(2,))
ONE_NUMBER = SimpleNamespace(low=-1.0, high=1.0, shape=())


def test_what_gymnax_says_of_itself():
    for space, actions in (
        (NUMBERED, 4),
        (BOUNDED, Box((-1.0, -3.0), (2.0, 2.0))),
        (ONE_NUMBER, Box((-1.0,), (1.0,))),
    ):
        walk = GymnaxWalk(space)
        env = Gymnax(walk, walk.default_params)
        assert env.actions == actions and env.max_steps == 30
        assert env.observation_size == 7
    with pytest.raises(TypeError, match="must be discrete or one box"):
        _ = Gymnax(GymnaxWalk(SimpleNamespace(spaces=())), Params()).actions


@pytest.mark.parametrize(
    ("space", "action"),
    ((NUMBERED, jnp.int32(1)), (BOUNDED, jnp.ones(2) / 2), (ONE_NUMBER, jnp.ones(1))),
)
def test_an_episode_in_gymnax(space, action):
    """Half a step forward each time, done at 2 after four, 3 for each."""
    env = Gymnax(GymnaxWalk(space), Params())
    state, observation = env.reset(KEY)
    assert observation.shape == (7,) and observation.dtype == jnp.float32
    after = env.step(state, action, KEY)
    np.testing.assert_allclose(after.observation[:6], state.x + 0.5, rtol=1e-6)
    assert after.observation[6] == 1 and after.reward.dtype == jnp.float32
    run = jax.jit(jax.vmap(lambda k: episode(lambda o, k: action, env, k)))
    found = run(jax.random.split(KEY, 3))
    np.testing.assert_array_equal(found.steps, [4, 4, 4])
    np.testing.assert_array_equal(found.total, [12.0, 12.0, 12.0])
    assert found.done.all() and found.done.dtype == bool
    slow = Gymnax(env.environment, Params(speed=0.0))
    found = episode(lambda o, k: action, slow, KEY)
    assert int(found.steps) == 30 and not found.done


def test_an_episode_in_brax():
    env = Brax(BraxWalk(), max_steps=9)
    assert env.observation_size == 5 and env.actions == Box((-1.0,) * 2, (1.0,) * 2)
    run = jax.jit(lambda a, k: episode(lambda o, _: a, env, k))
    found = run(jnp.asarray([0.75, 0.25]), KEY)
    start = float(jax.random.uniform(jax.random.split(KEY)[0]))
    steps = int(np.ceil((2 - start) / 0.5))
    assert int(found.steps) == steps and bool(found.done)
    assert float(found.total) == 0.75 * steps
    found = run(jnp.zeros(2), KEY)
    assert int(found.steps) == 9 and not found.done


def test_made_by_name(monkeypatch):
    walk = GymnaxWalk(NUMBERED)
    library = SimpleNamespace(make=lambda name, **settings: (walk, (name, settings)))
    monkeypatch.setitem(sys.modules, "gymnax", library)
    env = Gymnax.make("Walk-v0", size=3)
    assert env.environment is walk and env.parameters == ("Walk-v0", {"size": 3})
    envs = SimpleNamespace(get_environment=lambda name, **settings: (name, settings))
    monkeypatch.setitem(sys.modules, "brax", SimpleNamespace(envs=envs))
    monkeypatch.setitem(sys.modules, "brax.envs", envs)
    env = Brax.make("ant", max_steps=5, backend="spring")
    assert env.environment == ("ant", {"backend": "spring"}) and env.max_steps == 5


@pytest.mark.parametrize(
    ("make", "library"), ((Gymnax.make, "gymnax"), (Brax.make, "brax"))
)
def test_a_missing_library_is_named_with_its_extra(make, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"{library}.*extra `rl`.*'\.\[rl\]'"):
        make("any")
