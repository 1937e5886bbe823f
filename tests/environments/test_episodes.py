"""Episodes: the loop of a policy in an environment against a Python loop."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.environments import Acrobot, CartPole, Pendulum, Step, episode, returns

KEYS = jax.random.split(jax.random.key(11), 8)


class Place(NamedTuple):
    """State of `Countdown`: any pytree will do."""

    length: jax.Array
    t: jax.Array


@dataclasses.dataclass(frozen=True)
class Countdown:
    """Lasts 1 to 9 steps, pays 2^t at step t and a fortune after its end."""

    observation_size: int = 2
    actions: int = 2
    max_steps: int = 20

    def reset(self, key):
        state = Place(jax.random.randint(key, (), 1, 10), jnp.int32(0))
        return state, self.observe(state)

    def observe(self, state):
        return jnp.stack([state.length, state.t]).astype(jnp.float32)

    def step(self, state, action, key):
        over = state.t >= state.length
        reward = jnp.where(over, 1e6, jnp.exp2(state.t.astype(jnp.float32)))
        state = state._replace(t=state.t + 1)
        # Done at the last step alone: whoever goes on sees an episode that is not done.
        return Step(state, self.observe(state), reward, state.t == state.length)


def lean(observation, key):
    """A policy for CartPole that keeps it up for a while, with some chance in it."""
    push = observation @ jnp.asarray([0.1, 0.2, 1.0, 0.3]) + 0.7 * jax.random.normal(
        key
    )
    return (push > 0).astype(jnp.int32)


def by_hand(policy, reset, step, key, limit):
    """The rewards of an episode, one step after the other."""
    of_reset, of_steps = jax.random.split(key)
    state, observation = reset(of_reset)
    rewards, done = [], False
    while not done and len(rewards) < limit:
        step_key = jax.random.fold_in(of_steps, len(rewards))
        of_policy, of_environment = jax.random.split(step_key)
        action = policy(observation, of_policy)
        state, observation, reward, done = step(state, action, of_environment)
        rewards.append(float(reward))
    return rewards, bool(done)


def test_an_episode_is_the_loop_by_hand_alone_and_among_others():
    """CartPole with episodes of different lengths, some ended by the limit."""
    env, limit = CartPole(), 60
    policy, step = jax.jit(lean), jax.jit(env.step)
    run = lambda key: episode(lean, env, key, max_steps=limit)  # noqa: E731
    together = jax.jit(jax.vmap(run))(KEYS)
    alone = [jax.jit(run)(key) for key in KEYS]
    for i, key in enumerate(KEYS):
        rewards, done = by_hand(policy, env.reset, step, key, limit)
        for found in (alone[i], jax.tree.map(lambda x, i=i: x[i], together)):
            assert float(found.total) == sum(rewards)
            assert int(found.steps) == len(rewards) and bool(found.done) == done
    assert len(set(together.steps.tolist())) > 3
    assert together.done.any() and not together.done.all()


def test_nothing_counts_after_the_end():
    env = Countdown()
    run = lambda key: episode(lambda o, k: jnp.int32(0), env, key)  # noqa: E731
    found = jax.vmap(run)(KEYS)
    lengths = [int(env.reset(jax.random.split(key)[0])[0].length) for key in KEYS]
    assert len(set(lengths)) > 3
    np.testing.assert_array_equal(found.steps, lengths)
    np.testing.assert_array_equal(found.total, [2.0**n - 1 for n in lengths])
    assert found.done.all()


def test_the_limit_ends_an_episode():
    env = Countdown()
    found = episode(lambda o, k: jnp.int32(0), env, KEYS[0], max_steps=1)
    assert int(found.steps) == 1 and float(found.total) == 1.0
    for environment, most in ((Pendulum(), 200), (Acrobot(), 500)):
        still = jnp.zeros(1) if isinstance(environment, Pendulum) else jnp.int32(1)
        found = jax.jit(lambda k, e=environment, a=still: episode(lambda *_: a, e, k))(
            KEYS[0]
        )
        assert int(found.steps) == most and not found.done
    assert float(found.total) == -500.0
    with pytest.raises(ValueError, match="max_steps is 0, but an episode has at least"):
        episode(lean, CartPole(), KEYS[0], max_steps=0)


def test_among_others_the_loop_stops_with_the_longest():
    """Counted where it runs: a step takes the whole population along, and no more."""
    calls = []

    def policy(observation, key):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.int32(0)

    env = Countdown()
    run = jax.vmap(lambda key: episode(policy, env, key).steps)
    steps = jax.block_until_ready(run(KEYS))
    jax.effects_barrier()
    assert len(calls) in (int(steps.max()), int(steps.max()) * len(KEYS))


def test_what_the_population_shares_is_not_copied_for_each():
    """A shared matrix meets all members in one product without a batch."""
    shared = jnp.ones((4, 3))
    own = jnp.ones((8, 4, 3))
    text = {}
    for name, w, axis in (("shared", shared, None), ("own", own, 0)):

        def run(w, key):
            policy = lambda o, k: jnp.argmax(o @ w).astype(jnp.int32) % 2  # noqa: E731
            return episode(policy, CartPole(), key).total

        text[name] = str(jax.make_jaxpr(jax.vmap(run, (axis, 0)))(w, KEYS))
    assert "f32[8,4,3]" in text["own"] and "f32[8,4,3]" not in text["shared"]
    assert "f32[4,3]" in text["shared"]


def test_returns_are_the_totals_of_episodes():
    env = Countdown()
    found = returns(lambda o, k: jnp.int32(0), env, KEYS[0], 5)
    want = [
        episode(lambda o, k: jnp.int32(0), env, key).total
        for key in jax.random.split(KEYS[0], 5)
    ]
    np.testing.assert_array_equal(found, want)
    short = returns(lambda o, k: jnp.int32(0), env, KEYS[0], 5, max_steps=1)
    np.testing.assert_array_equal(short, jnp.ones(5))
