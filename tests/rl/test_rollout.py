"""Rollouts: the same numbers as one plain forward, whatever stands around a prompt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import models, params, rl
from jaxlab.inference import SamplingParams, generate
from jaxlab.mixers import attention, mamba2
from jaxlab.models import LMConfig
from jaxlab.params import LowRank, value

W, N, SAMPLES, TEMPERATURE, STOP = 16, 5, 1000, 0.7, 3
CFG = LMConfig(
    vocab_size=W,
    width=32,
    n_layers=2,
    pattern=(
        mamba2.Config(32, head_size=16, n_states=8),
        attention.Config(32, n_heads=2),
    ),
)
PARAMS = jax.jit(functools.partial(models.init, CFG))(jax.random.key(1))
PROMPTS = jax.random.randint(jax.random.key(2), (2, 6), 0, W)
LENGTHS = (6, 2)
IDS = jnp.asarray([[-1] * (6 - n) + [0] * n for n in LENGTHS])
KEY = jax.random.key(5)

sample = jax.jit(
    functools.partial(
        rl.sample,
        cfg=CFG,
        max_tokens=N,
        temperature=TEMPERATURE,
        stop=STOP,
        samples=SAMPLES,
    )
)
score = jax.jit(
    functools.partial(rl.log_probabilities, cfg=CFG, temperature=TEMPERATURE)
)
plain = jax.jit(lambda params, tokens: models.forward(params, tokens, CFG)[0])


@functools.cache
def drawn():
    return sample(PARAMS, PROMPTS, IDS, KEY)


def of(row):
    """Tokens, log-probabilities and mask of one prompt's completions."""
    own = slice(row * SAMPLES, (row + 1) * SAMPLES)
    return [np.asarray(a[own]) for a in vars(drawn()).values()]


@functools.cache
def distributions(row):
    """softmax(logits / temperature) at each token, float64, by a plain forward."""
    prompt = jnp.tile(PROMPTS[row, -LENGTHS[row] :][None], (SAMPLES, 1))
    logits = plain(PARAMS, jnp.concatenate([prompt, of(row)[0]], axis=1))
    logits = np.asarray(logits[:, LENGTHS[row] - 1 : -1], np.float64) / TEMPERATURE
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("row", range(2))
def test_log_probabilities_are_those_of_the_prompt_without_padding(row):
    """Of the draws, step by step, and of given tokens, in parallel."""
    tokens, log_p, mask = of(row)
    p = np.take_along_axis(distributions(row), tokens[..., None], -1)[..., 0]
    want = mask * np.log(p)
    np.testing.assert_allclose(log_p, want, rtol=1e-4, atol=1e-5)
    every = drawn()
    parallel = score(PARAMS, PROMPTS, IDS, every.tokens, every.mask)
    parallel = parallel.reshape(2, SAMPLES, N)[row]
    np.testing.assert_allclose(parallel, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", range(2))
def test_draws_follow_the_distribution(row):
    """The shares of the first token, within five standard errors."""
    p = distributions(row)[0, 0]
    share = np.bincount(of(row)[0][:, 0], minlength=W) / SAMPLES
    assert np.all(np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / SAMPLES))


def test_a_row_ends_with_its_first_stop_token():
    tokens, log_p, mask = map(np.asarray, vars(drawn()).values())
    lengths = mask.sum(1).astype(int)
    assert set(lengths) >= {1, N}
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(mask[row], np.arange(N) < length)
        assert STOP not in tokens[row, : length - 1]
        assert length == N or tokens[row, length - 1] == STOP
        assert (tokens[row, length:] == STOP).all() and not log_p[row, length:].any()


def test_greedy_is_generation_at_temperature_0():
    """And without a stop token every row has all its tokens."""
    run = functools.partial(rl.sample, cfg=CFG, max_tokens=N, temperature=0, samples=2)
    greedy = jax.jit(run)(PARAMS, PROMPTS, IDS, KEY)
    how = SamplingParams(max_tokens=N, temperature=0)
    for row, length in enumerate(LENGTHS):
        want = generate(PARAMS, PROMPTS[row : row + 1, -length:], CFG, how)
        np.testing.assert_array_equal(
            greedy.tokens[2 * row : 2 * row + 2], [want[0]] * 2
        )
    assert np.all(greedy.mask == 1) and not np.any(greedy.log_probabilities)


def test_the_gradient_is_that_of_whole_sequences_as_far_as_the_mask():
    """Through padding and the state that the completions of a prompt share."""
    row, few = 1, 4
    tokens, _, mask = (
        a.reshape(2, SAMPLES, N)[:, :few] for a in vars(drawn()).values()
    )
    assert 0 < mask[row].sum() < few * N
    weights = jax.random.normal(KEY, (few, N))

    @jax.jit
    @jax.grad
    def shared(params, tokens):
        log_p = score(params, PROMPTS, IDS, tokens.reshape(-1, N), mask.reshape(-1, N))
        return jnp.sum(weights * log_p.reshape(2, few, N)[row])

    @jax.jit
    @jax.grad
    def apart(params):
        prompt = jnp.tile(PROMPTS[row, -LENGTHS[row] :][None], (few, 1))
        logits = plain(params, jnp.concatenate([prompt, tokens[row]], axis=1))
        log_p = jax.nn.log_softmax(logits[:, LENGTHS[row] - 1 : -1] / TEMPERATURE)
        log_p = jnp.take_along_axis(log_p, tokens[row][..., None], -1)[..., 0]
        return jnp.sum(weights * mask[row] * log_p)

    got, want = shared(PARAMS, tokens), apart(PARAMS)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(g - w) <= 1e-4 * np.linalg.norm(w) + 1e-6
    other = jnp.where(mask > 0, tokens, (tokens + 7) % W)
    jax.tree.map(np.testing.assert_array_equal, got, shared(PARAMS, other))


def test_members_of_a_population_draw_as_if_alone():
    """Low-rank leaves that share their base, against dense parameters one by one."""
    M, specs = 3, models.spec(CFG)

    def member(spec, w):
        if spec.role not in ("matrix", "embedding"):
            return w
        a, b = (
            0.2 * jax.random.normal(KEY, (M, *w.shape[:-2], size, 1))
            for size in w.shape[-2:]
        )
        return LowRank(w, a, b)

    is_low = lambda w: isinstance(w, LowRank)  # noqa: E731
    stacked = jax.tree.map(member, specs, PARAMS)
    axes = jax.tree.map(
        lambda w: LowRank(None, 0, 0) if is_low(w) else None, stacked, is_leaf=is_low
    )
    keys = jax.random.split(KEY, M)
    run = lambda p, key: sample(p, PROMPTS, IDS, key)  # noqa: E731
    together = jax.jit(jax.vmap(run, in_axes=(axes, 0)))(stacked, keys)
    dense = jax.vmap(lambda p: jax.tree.map(value, p, is_leaf=is_low), in_axes=(axes,))(
        stacked
    )
    seen = []
    for m in range(M):
        alone = run(jax.tree.map(lambda a, m=m: a[m], dense), keys[m])
        np.testing.assert_array_equal(together.tokens[m], alone.tokens)
        np.testing.assert_allclose(
            together.log_probabilities[m],
            alone.log_probabilities,
            rtol=1e-3,
            atol=1e-4,
        )
        seen.append(np.asarray(alone.log_probabilities))
    assert not np.allclose(seen[0], seen[1], atol=0.1)
    assert params.count(PARAMS) < params.count(stacked) < 2 * params.count(PARAMS)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (
            lambda: rl.sample(PARAMS, PROMPTS, IDS[:, 1:], KEY, CFG, max_tokens=1),
            r"segment_ids \(2, 5\) must have one shape",
        ),
        (
            lambda: rl.sample(
                PARAMS, PROMPTS[:, :0], IDS[:, :0], KEY, CFG, max_tokens=1
            ),
            "at least one token",
        ),
        (
            lambda: rl.sample(PARAMS, PROMPTS, IDS, KEY, CFG, max_tokens=0),
            "max_tokens=0",
        ),
        (
            lambda: rl.sample(
                PARAMS, PROMPTS, IDS, KEY, CFG, max_tokens=1, temperature=-1.0
            ),
            "temperature=-1.0",
        ),
        (
            lambda: rl.sample(PARAMS, PROMPTS, IDS, KEY, CFG, max_tokens=1, samples=0),
            "samples=0",
        ),
        (
            lambda: score(
                PARAMS, PROMPTS, IDS, jnp.zeros((3, N), jnp.int32), jnp.ones((3, N))
            ),
            r"as many rows for each of the prompts \(2, 6\)",
        ),
        (
            lambda: rl.log_probabilities(
                *(PARAMS, PROMPTS, IDS, PROMPTS, jnp.ones((2, 6)), CFG), temperature=0
            ),
            "a greedy choice has no log-probability",
        ),
    ),
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
