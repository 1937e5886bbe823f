"""Sampling rules: draws follow the adjusted distribution, at every temperature."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.decoding import SamplingParams, adjusted_logits, sample_token


def test_sampling_follows_the_distribution():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32))[None], (20_000, 4))

    def shares(**how):
        how = SamplingParams(**{"temperature": 1.0} | how)
        tokens = sample_token(logits, jax.random.key(0), how)
        return np.bincount(tokens, minlength=4) / len(tokens)

    sigma = 4 * np.sqrt(0.25 / 20_000)  # four standard errors
    np.testing.assert_allclose(shares(), p, atol=sigma)
    square = p**2 / np.sum(p**2)
    np.testing.assert_allclose(shares(temperature=0.5), square, atol=sigma)
    kept = np.array([0.5, 0.3, 0, 0]) / 0.8
    np.testing.assert_allclose(shares(top_p=0.8), kept, atol=sigma)
    np.testing.assert_allclose(shares(top_p=0.1), [1, 0, 0, 0])


def kept(logits, **how):
    """The ids that may be drawn from one row of logits."""
    how = SamplingParams(**{"temperature": 1.0} | how)
    adjusted = adjusted_logits(jnp.asarray(logits, jnp.float32)[None], how)[0]
    assert np.max(adjusted) == 0
    return np.flatnonzero(np.isfinite(adjusted)).tolist()


def test_the_nucleus_is_the_smallest_set():
    """Also of equal logits, of which the lowest ids stay."""
    assert kept(np.zeros(1000), top_p=0.01) == list(range(10))
    assert kept(np.zeros(1000), top_p=0.0101) == list(range(11))
    assert kept(np.zeros(1000), top_p=1e-9) == [0]
    logits = np.full(1000, -np.inf)
    logits[:6] = np.log([0.1, 0.2, 0.1, 0.3, 0.2, 0.1])
    assert kept(logits, top_p=0.45) == [1, 3]
    assert kept(logits, top_p=0.75) == [0, 1, 3, 4]
    assert kept(logits, top_p=0.95) == [0, 1, 2, 3, 4, 5]
    assert kept(logits, top_p=0.9999999) == [0, 1, 2, 3, 4, 5]
    logits = np.random.default_rng(0).normal(size=1000)
    p = np.sort(np.exp(logits))[::-1] / np.exp(logits).sum()
    assert len(kept(logits, top_p=0.8)) == np.searchsorted(np.cumsum(p), 0.8) + 1


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-40, 1e-38, 1e-30])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_lowest_temperatures_take_the_largest_logit(temperature, top_p):
    logits = jnp.array([[-2.0, 3.0, 2.9999998, -np.inf], [900.0, -900.0, 0.0, 899.99]])
    how = SamplingParams(temperature=temperature, top_p=top_p)
    for seed in range(3):
        tokens = sample_token(logits, jax.random.key(seed), how)
        np.testing.assert_array_equal(tokens, [1, 0])
    adjusted = adjusted_logits(logits, how)
    np.testing.assert_array_equal(np.argmax(adjusted, axis=-1), [1, 0])
    np.testing.assert_array_equal(np.exp(adjusted).sum(-1), [1, 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1}, "temperature=-1 is below 0"),
        ({"temperature": float("nan")}, "temperature=nan is not a finite number"),
        ({"temperature": float("inf")}, "temperature=inf is not a finite number"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"seed": -1}, r"seed=-1 is outside 0 to 2\*\*32 - 1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"stop": (3, -1)}, r"stop=\(3, -1\) has an id below 0"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 1.5},
        {"max_tokens": "all"},
        {"temperature": "high"},
        {"temperature": None},
        {"top_p": True},
        {"seed": 0.5},
        {"stop": (1.5,)},
        {"stop": ("end",)},
    ],
    ids=str,
)
def test_other_types(settings):
    ((name, value),) = settings.items()
    message = re.escape(f"{name}={value!r} must")
    with pytest.raises(TypeError, match=message):
        SamplingParams(**settings)


def test_stop_is_a_tuple():
    with pytest.raises(TypeError, match="stop=3 must be a tuple of token ids"):
        SamplingParams(stop=3)
