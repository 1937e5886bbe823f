"""Generation: greedy decoding is argmax of forward; sampling follows the logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import config, models
from jaxlab.inference import SamplingParams, generate
from jaxlab.mixers import attention, gla
from jaxlab.models import LMConfig

CFG = LMConfig(
    vocab_size=16,
    width=16,
    n_layers=2,
    pattern=(gla.Config(16, n_heads=2), attention.Config(16, n_heads=2)),
)
ONE_TOKEN = np.zeros((2, 1), np.int32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(models.init, static_argnums=0)(CFG, jax.random.key(20260101))


def test_greedy_generation_equals_argmax_of_forward(params):
    prompt = np.random.default_rng(0).integers(0, 16, (2, 3), np.int32)
    tokens = generate(params, prompt, CFG, SamplingParams(max_tokens=5, temperature=0))
    sequence = np.concatenate([prompt, tokens], axis=1)
    logits, _ = jax.jit(models.forward, static_argnums=2)(params, sequence, CFG)
    greedy = np.argmax(np.asarray(logits)[:, 2:-1], -1)
    np.testing.assert_array_equal(greedy, tokens)


def test_only_the_tokenizers_ids_are_drawn(params):
    how = SamplingParams(max_tokens=200, temperature=3.0)
    drawn = np.unique(generate(params, ONE_TOKEN, CFG, how, vocab_size=5))
    np.testing.assert_array_equal(drawn, np.arange(5))


FREE = SamplingParams(max_tokens=30, temperature=2.0)


def test_another_seed_is_another_sample_of_the_same_program(params):
    first = generate(params, ONE_TOKEN, CFG, FREE)
    with jax.no_tracing():
        other = generate(params, ONE_TOKEN, CFG, dataclasses.replace(FREE, seed=1))
    assert np.any(np.asarray(first) != np.asarray(other))


def test_a_row_ends_with_a_stop_token(params):
    free = np.asarray(generate(params, ONE_TOKEN, CFG, FREE))
    stop = int(free[0, 3])
    how = dataclasses.replace(FREE, stop=(stop,))
    tokens = np.asarray(generate(params, ONE_TOKEN, CFG, how))
    for row, expected in zip(tokens, free, strict=True):
        end = int(np.argmax(expected == stop)) if stop in expected else 30
        np.testing.assert_array_equal(row[: end + 1], expected[: end + 1])
        assert (row[end:] == stop).all()


def test_settings_saved_by_their_older_name_are_settings():
    """Configs saved before `jaxlab.decoding` name another module."""
    older = "jaxlab.inference.sampling.SamplingParams"
    saved = config.to_json(SamplingParams(max_tokens=3)) | {"type": older}
    assert config.from_json(saved) == SamplingParams(max_tokens=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: generate({}, jnp.zeros((1, 0), jnp.int32), CFG, SamplingParams()),
            r"shape \(1, 0\)",
        ),
        (
            lambda: generate({}, jnp.full((1, 2), 16), CFG, SamplingParams()),
            r"prompts\[0, 0\] is 16, but the model's ids are 0 to 15",
        ),
        (
            lambda: generate(
                {}, jnp.ones((1, 2), int), CFG, SamplingParams(), vocab_size=17
            ),
            "vocab_size=17 is above the model's 16",
        ),
        (
            lambda: generate(
                {}, jnp.ones((1, 2), int), CFG, SamplingParams(), vocab_size=0
            ),
            "vocab_size=0 must be at least 1",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
