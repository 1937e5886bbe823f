"""The perceptron against numpy, with plain weights and as members of a population."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import params as parameters
from jaxlab.evolution import EGGROLL
from jaxlab.models import perceptron
from jaxlab.params import LowRank, value
from tests.evolution import asked

CFG = perceptron.Config(observation_size=5, outputs=3, width=8, layers=2)
KEY = jax.random.key(4)


@functools.cache
def weights_away_from_their_start():
    """Biases, scales and shifts that are not zero and one."""
    rng = np.random.default_rng(0)

    def moved(w):
        return jnp.asarray(w + 0.3 * rng.standard_normal(w.shape), jnp.float32)

    initial = jax.jit(lambda key: parameters.init(perceptron.spec(CFG), key))
    return jax.tree.map(moved, jax.device_get(initial(KEY)))


def normal(*shape):
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def oracle(weights, observation):
    """Entry by entry in float64."""
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), weights)
    x = np.asarray(observation, np.float64)
    for i in range(CFG.layers):
        layer = w[f"hidden_{i}"]
        h = [sum(x * layer["w"][:, j]) + layer["b"][j] for j in range(CFG.width)]
        mean = sum(h) / len(h)
        deviation = np.sqrt(sum((a - mean) ** 2 for a in h) / len(h) + 1e-6)
        h = (np.array(h) - mean) / deviation * layer["scale"] + layer["shift"]
        x = np.maximum(h, 0)
    return x @ w["last"]["w"] + w["last"]["b"]


def test_the_network_is_the_formula():
    weights = weights_away_from_their_start()
    forward = jax.jit(perceptron.forward, static_argnums=2)
    sizes = np.float32([1e-3, 1.0, 100.0, 0.0])
    for observation in sizes[:, None] * normal(4, 5):
        got = forward(weights, observation, CFG)
        np.testing.assert_allclose(got, oracle(weights, observation), 2e-5, 2e-5)


def test_the_parameters_are_those_of_the_sizes():
    specs = perceptron.spec(CFG)
    assert specs["hidden_0"]["w"].shape == (5, 8)
    assert specs["hidden_1"]["w"].shape == (8, 8)
    assert specs["last"]["w"].shape == (8, 3)
    assert parameters.count(specs) == (5 * 8 + 24) + (8 * 8 + 24) + (8 * 3 + 3)
    roles = {k: s.role for k, s in specs["hidden_0"].items()}
    assert roles == {"w": "matrix", "b": "bias", "scale": "scale", "shift": "bias"}


@pytest.mark.parametrize("rank", (1, 3, None))
def test_members_act_like_their_dense_weights(rank):
    strategy = EGGROLL(6, rank, sigma=0.3).build(perceptron.spec(CFG), optax.sgd(0.1))
    stacked, axes = asked.members(strategy, perceptron.spec(CFG))
    assert isinstance(stacked["last"]["w"], LowRank) == (rank is not None)
    x = normal(6, 5)

    @jax.jit
    def both(stacked):
        """What members do, and their dense weights."""
        act = jax.vmap(lambda w, x: perceptron.forward(w, x, CFG), (axes, 0))
        dense = jax.vmap(
            lambda w: jax.tree.map(value, w, is_leaf=lambda x: isinstance(x, LowRank)),
            (axes,),
        )
        return act(stacked, x), dense(stacked)

    got, dense = jax.device_get(both(stacked))
    want = [oracle(jax.tree.map(lambda w, i=i: w[i], dense), x[i]) for i in range(6)]
    np.testing.assert_allclose(got, want, 2e-5, 2e-5)
    assert np.std(got, axis=0).min() > 0.01


def test_greedy_takes_the_largest_output_and_the_first_of_equals():
    weights = weights_away_from_their_start()
    observations = normal(20, 5)
    act = jax.jit(jax.vmap(lambda w, o: perceptron.greedy(w, o, CFG), (None, 0)))
    got = act(weights, observations)
    assert got.tolist() == [int(np.argmax(oracle(weights, o))) for o in observations]
    assert got.dtype == jnp.int32 and len(set(got.tolist())) > 1
    silent = jax.tree.map(np.zeros_like, jax.device_get(weights))
    assert not np.any(act(silent, observations))


def test_samples_are_as_frequent_as_the_softmax_says():
    weights = weights_away_from_their_start()
    observation = normal(5)
    sample = lambda key: perceptron.sample(weights, observation, CFG, key)  # noqa: E731
    draw = jax.jit(jax.vmap(sample))
    drawn = np.bincount(draw(jax.random.split(KEY, 4000)), minlength=3) / 4000
    outputs = np.exp(oracle(weights, observation))
    expected = outputs / outputs.sum()
    assert expected.min() > 0.02
    np.testing.assert_allclose(drawn, expected, atol=4 * np.sqrt(0.25 / 4000))


def test_bounded_actions_fill_their_box():
    weights = weights_away_from_their_start()
    low, high = np.float32([-2.0, 0.0, 5.0]), np.float32([2.0, 1.0, 5.5])
    observation = normal(5)
    bounded = jax.jit(perceptron.bounded, static_argnums=2)
    got = bounded(weights, observation, CFG, low, high)
    share = (np.tanh(oracle(weights, observation)) + 1) / 2
    np.testing.assert_allclose(got, low + share * (high - low), rtol=1e-5)
    for sign, bound in ((-1, low), (1, high)):
        b = np.full(3, sign * 50.0, np.float32)
        last = {"w": np.zeros((8, 3), np.float32), "b": b}
        got = bounded(weights | {"last": last}, observation, CFG, low, high)
        np.testing.assert_array_equal(got, bound)


@pytest.mark.parametrize("name", ("observation_size", "outputs", "width", "layers"))
def test_sizes_that_cannot_be(name):
    sizes = {"observation_size": 4, "outputs": 2} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0, but must be at least 1"):
        perceptron.Config(**sizes)
