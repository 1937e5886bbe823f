"""Rewards: exact match by hand, pass@k by enumeration, fitness by its meaning."""

import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import models, rl
from jaxlab.mixers import retnet
from jaxlab.models import LMConfig

CFG = LMConfig(
    vocab_size=8, width=32, n_layers=1, pattern=(retnet.Config(32, n_heads=2),)
)
forward = jax.jit(models.forward, static_argnames="cfg")
PARAMS = models.init(CFG, jax.random.key(1))
QUESTIONS = rl.Questions(
    prompts=jnp.asarray([[0, 7, 1], [7, 2, 3]]),
    segment_ids=jnp.asarray([[-1, 0, 0], [0, 0, 0]]),
    answers=jnp.asarray([[4, 0], [5, 6]]),
    answer_mask=jnp.asarray([[1.0, 0.0], [1.0, 1.0]]),
)
PLAIN = (([7, 1], [4]), ([7, 2, 3], [5, 6]))  # the same, as lists
KEY = jax.random.key(3)


def answer_probability(prompt, answer):
    """By one plain forward, float64."""
    logits, _ = forward(PARAMS, jnp.asarray([prompt + answer]), CFG)
    logits = np.asarray(logits[0], np.float64)[len(prompt) - 1 : -1]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return float(np.prod(p[np.arange(len(answer)), answer]))


@pytest.mark.parametrize(
    ("completion", "answer", "want"),
    (
        ([4, 5, 6], [4, 5, 6], 1),
        ([4, 5, 6], [4, 5], 1),  # what follows does not matter
        ([4, 5], [4, 5], 1),
        ([4, 5], [4, 5, 0], 0),  # it ended too early, or is too short
        ([4, 0], [4, 5], 0),
        ([5, 4], [4, 5], 0),
        ([], [4], 0),
        ([0], [0], 1),  # token 0 is a token
        ([4], [], 1),
    ),
)
@pytest.mark.parametrize("width", (3, 4, 5))
def test_exact_match(completion, answer, want, width):
    """Of any widths of both arrays, with anything behind the ends."""

    def padded(tokens, size):
        fill = [*answer, 0, 0, 0, 0, 0][len(tokens) : size]
        mask = np.arange(size) < len(tokens)
        return jnp.asarray([tokens + fill]), jnp.asarray([mask], jnp.float32)

    got = rl.exact_match(*padded(completion, width), *padded(answer, 4))
    assert got.shape == (1,) and got.dtype == jnp.float32 and float(got[0]) == want


def test_an_answer_longer_than_the_completion_is_not_matched():
    tokens, answers = jnp.asarray([[4], [4]]), jnp.asarray([[4, 0], [4, 0]])
    mask = jnp.asarray([[1.0, 0.0], [1.0, 1.0]])
    got = rl.exact_match(tokens, jnp.ones((2, 1)), answers, mask)
    np.testing.assert_array_equal(got, [1, 0])


def test_pass_at_k_is_the_share_of_subsets_with_a_success():
    for n in range(1, 8):
        for k in range(1, n + 1):
            got = rl.pass_at_k(jnp.arange(n + 1), n, k)
            for c in range(n + 1):
                subsets = list(itertools.combinations(range(n), k))
                hits = sum(min(subset) < c for subset in subsets)
                share = float(Fraction(hits, len(subsets)))
                assert float(got[c]) == pytest.approx(share, abs=1e-6), (n, k, c)
            assert float(got[0]) == 0 and float(got[n]) == 1


def test_pass_at_k_of_many_samples_neither_overflows_nor_rounds_away():
    got = rl.pass_at_k(jnp.asarray([0, 1, 600, 1000]), 1000, 500)
    np.testing.assert_allclose(got, [0, 0.5, 1, 1], rtol=1e-4)


def test_likelihood_is_the_mean_of_whole_answers():
    want = np.mean([np.log(answer_probability(p, a)) for p, a in PLAIN])
    assert float(rl.likelihood(PARAMS, QUESTIONS, CFG)) == pytest.approx(want, rel=1e-4)


def test_rewards_of_parameters_are_the_expected_ones():
    """Over 20,000 samples within five standard errors; and pass@k of its own p."""
    n = 20_000
    chances = [answer_probability(p, a) for p, a in PLAIN]
    reward = jax.jit(
        functools.partial(rl.exact_match_reward, cfg=CFG, samples=n, temperature=1.0)
    )
    error = 5 * np.sqrt(sum(p * (1 - p) / n for p in chances)) / 2
    assert abs(float(reward(PARAMS, QUESTIONS, KEY)) - np.mean(chances)) < error

    repeated = QUESTIONS.repeat(2500)
    passes = jax.jit(functools.partial(rl.pass_at_k_reward, cfg=CFG, samples=8, k=4))
    want = np.mean([1 - (1 - p) ** 4 for p in chances])
    assert abs(float(passes(PARAMS, repeated, KEY)) - want) < 5 * 0.5 / np.sqrt(5000)


def test_the_greedy_reward_is_of_the_likeliest_tokens_and_needs_no_key():
    greedy = rl.sample(
        *(PARAMS, QUESTIONS.prompts, QUESTIONS.segment_ids, KEY, CFG),
        max_tokens=2,
        temperature=0,
    )
    asked = QUESTIONS.replace(answers=greedy.tokens.at[1, 1].add(1))
    first, other = (
        rl.exact_match_reward(PARAMS, asked, jax.random.key(seed), CFG)
        for seed in (0, 1)
    )
    assert first.shape == () and float(first) == float(other) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (
            lambda: rl.pass_at_k(jnp.ones(2), 4, 5),
            "k=5 needs k from 1 to the 4 samples",
        ),
        (
            lambda: rl.pass_at_k(jnp.ones(2), 4, 0),
            "k=0 needs k from 1 to the 4 samples",
        ),
        (
            lambda: rl.exact_match(
                *(jnp.ones((4, 2), jnp.int32), jnp.ones((4, 2))),
                *(QUESTIONS.answers, QUESTIONS.answer_mask),
            ),
            r"answers \(2, 2\) and answer_mask \(2, 2\) another, with as many rows",
        ),
    ),
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
