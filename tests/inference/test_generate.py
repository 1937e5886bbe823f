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


def test_greedy_generation_equals_argmax_of_forward(key):
    params = models.init(CFG, key)
    prompt = jax.random.randint(key, (2, 3), 0, 16)
    tokens = generate(params, prompt, CFG, SamplingParams(max_tokens=5, temperature=0))
    sequence = np.concatenate([prompt, tokens], axis=1)
    logits, _ = models.forward(params, jnp.asarray(sequence), CFG)
    np.testing.assert_array_equal(np.argmax(logits[:, 2:-1], -1), tokens)


def test_only_the_tokenizers_ids_are_drawn(key):
    params = models.init(CFG, key)
    how = SamplingParams(max_tokens=200, temperature=3.0)
    prompt = jnp.zeros((2, 1), jnp.int32)
    drawn = np.unique(generate(params, prompt, CFG, how, vocab_size=5))
    np.testing.assert_array_equal(drawn, np.arange(5))


def test_another_seed_is_another_sample_of_the_same_program(key):
    params, prompt = models.init(CFG, key), jnp.zeros((1, 1), jnp.int32)
    how = SamplingParams(max_tokens=20, temperature=2.0)
    first = generate(params, prompt, CFG, how)
    with jax.no_tracing():
        other = generate(params, prompt, CFG, dataclasses.replace(how, seed=1))
    assert np.any(np.asarray(first) != np.asarray(other))


def test_a_row_ends_with_a_stop_token(key):
    params, prompt = models.init(CFG, key), jnp.zeros((2, 1), jnp.int32)
    how = SamplingParams(max_tokens=30, temperature=2.0)
    free = np.asarray(generate(params, prompt, CFG, how))
    stop = int(free[0, 3])
    tokens = np.asarray(
        generate(params, prompt, CFG, dataclasses.replace(how, stop=(stop,)))
    )
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
