"""The decoding loop: padding, stop tokens, an early end, populations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import models
from jaxlab.decoding import SamplingParams, decode, prefill
from jaxlab.mixers import gla
from jaxlab.models import LMConfig

W, N, P = 16, 12, 4
CFG = LMConfig(W, 16, 2, (gla.Config(16, n_heads=2, gate_rank=2),))
PARAMS = jax.jit(models.init, static_argnums=0)(CFG, jax.random.key(1))
PROMPTS = jax.random.randint(jax.random.key(2), (3, P), 0, W)
IDS = jnp.asarray([[0] * 4, [-1] * 2 + [0] * 2, [-1] * 3 + [0]])
KEY = jax.random.key(5)


def run(how, prompts=PROMPTS, ids=IDS, **settings):
    function = functools.partial(decode, cfg=CFG, how=how, **settings)
    return jax.jit(function)(PARAMS, prompts, key=KEY, segment_ids=ids)


@functools.cache
def free():
    """Without stop tokens."""
    return run(SamplingParams(N, temperature=1.5, top_p=0.9))


def test_log_probabilities_are_of_the_cut_distribution():
    """By one forward pass of each prompt without its padding."""
    tokens, log_p, mask = map(np.asarray, vars(free()).values())
    assert mask.all()
    forward = jax.jit(functools.partial(models.forward, cfg=CFG))
    for row, length in enumerate((4, 2, 1)):
        sequence = np.concatenate([PROMPTS[row, P - length :], tokens[row]])
        padded = np.zeros(P + N, np.int32)
        padded[: len(sequence)] = sequence
        logits, _ = forward(PARAMS, padded[None])
        logits = np.asarray(logits[0, length - 1 :][:N], np.float64) / 1.5
        for t in range(N):
            p = np.exp(logits[t] - logits[t].max())
            order = np.argsort(-p)
            size = np.searchsorted(np.cumsum(p[order]) / p.sum(), 0.9) + 1
            assert tokens[row, t] in order[:size]
            expected = np.log(p[tokens[row, t]] / p[order[:size]].sum())
            np.testing.assert_allclose(log_p[row, t], expected, rtol=1e-4, atol=1e-4)


def test_stop_tokens_end_rows_and_then_the_loop(monkeypatch):
    """Up to its end a row has the draws that it has without stop tokens."""
    tokens, log_p, _ = map(np.asarray, vars(free()).values())
    stop = tuple(int(row[3]) for row in tokens[:2]) + (int(tokens[2, 6]),)
    steps, step = [], models.hidden_step

    def counted(*arguments):
        jax.debug.callback(lambda: steps.append(1))
        return step(*arguments)

    monkeypatch.setattr(models, "hidden_step", counted)
    how = SamplingParams(N, temperature=1.5, top_p=0.9, stop=stop)
    got = jax.block_until_ready(run(how))
    jax.effects_barrier()
    stops = np.isin(tokens, stop)
    lengths = 1 + np.argmax(stops, axis=1)
    assert len(set(lengths)) > 1 and len(steps) == lengths.max() - 1 < N - 1
    alive = np.arange(N) < lengths[:, None]
    np.testing.assert_array_equal(got.mask, alive)
    np.testing.assert_array_equal(got.tokens, np.where(alive, tokens, stop[0]))
    np.testing.assert_allclose(
        got.log_probabilities, np.where(alive, log_p, 0), rtol=1e-5, atol=1e-6
    )


def test_a_population_ends_together():
    """Each member as by itself, and no loop copies its state to keep it."""
    how = SamplingParams(N, temperature=1.5, stop=(3,))
    base = jax.device_get(PARAMS)
    members = jax.tree.map(lambda w: np.stack([w, 2 * w, w / 2]), base)

    def member(p):
        return decode(p, PROMPTS, CFG, how, KEY, segment_ids=IDS)

    together = jax.vmap(member)
    alone = jax.jit(member)
    got = jax.jit(together)(members)
    for m in range(3):
        want = alone(jax.tree.map(lambda w, m=m: w[m], members))
        np.testing.assert_array_equal(got.tokens[m], want.tokens)
        np.testing.assert_array_equal(got.mask[m], want.mask)
    loops = [
        eqn.params["cond_jaxpr"].out_avals[0].shape
        for eqn in jax.make_jaxpr(together)(members).eqns
        if eqn.primitive.name == "while"
    ]
    assert loops == [()]  # and not [(3,)], an answer for each member


def test_only_the_tokenizers_ids_and_the_samples_of_each_prompt(key):
    how = SamplingParams(1, temperature=3.0)
    got = run(how, samples=200, vocab_size=5)
    assert got.tokens.shape == (600, 1) and np.max(got.tokens) == 4
    begin = functools.partial(prefill, cfg=CFG, max_tokens=1, segment_ids=IDS)
    x, state = jax.jit(functools.partial(begin, samples=2))(PARAMS, PROMPTS)
    once, _ = jax.jit(begin)(PARAMS, PROMPTS)
    np.testing.assert_array_equal(x, np.repeat(once, 2, axis=0))
    first = np.asarray(jax.tree.leaves(state)[0])
    np.testing.assert_array_equal(first[:, ::2], first[:, 1::2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": PROMPTS[:, :0], "ids": None}, r"have shape \(3, 0\)"),
        ({"prompts": PROMPTS[0], "ids": None}, r"prompts has shape \(4,\), but must"),
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"vocab_size": W + 1}, "vocab_size=17 is above the model's 16"),
        ({"ids": IDS[:, 1:]}, r"segment_ids \(3, 3\) must have one shape"),
        ({"samples": 0}, "samples=0"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        run(SamplingParams(1), **changes)


def give(**changes):
    """Decode with changed arguments, which stop it before it begins."""
    arguments = {"how": SamplingParams(1), "key": KEY, "segment_ids": IDS}
    return decode(PARAMS, PROMPTS, CFG, **arguments | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"how": {"max_tokens": 1}}, TypeError, "how is of type dict, but must be Sam"),
        ({"key": 0}, TypeError, r"key is of type int, but must be .* jax.random.key"),
        ({"key": None}, TypeError, "key is of type NoneType, but must be a PRNG key"),
        ({"vocab_size": 2.5}, TypeError, "vocab_size=2.5 must be a whole number"),
        ({"vocab_size": "all"}, TypeError, "vocab_size='all' must be a whole number"),
        ({"samples": 1.5}, TypeError, "samples=1.5 must be a whole number"),
        ({"samples": True}, TypeError, "samples=True must be a whole number"),
        ({"segment_ids": IDS.tolist()}, TypeError, "segment_ids is of type list, but"),
        (
            {"segment_ids": IDS.at[1, -1].set(-1)},
            ValueError,
            "Prompt 1 ends with padding, .* pad prompts on the left",
        ),
        (
            {"how": SamplingParams(1, stop=(3, W))},
            ValueError,
            r"stop=\(3, 16\) has the id 16, but only the ids 0 to 15 are drawn",
        ),
        (
            {"how": SamplingParams(1, stop=(9,)), "vocab_size": 5},
            ValueError,
            "has the id 9, but only the ids 0 to 4 are drawn",
        ),
    ],
)
def test_what_is_known_before_it_begins(changes, error, message):
    with pytest.raises(error, match=message):
        give(**changes)


@pytest.mark.parametrize("room", (-1, 1.5, None))
def test_room_for_tokens_is_a_count(room):
    with pytest.raises((TypeError, ValueError), match=f"max_tokens={room} must be"):
        prefill(PARAMS, PROMPTS, CFG, max_tokens=room)
