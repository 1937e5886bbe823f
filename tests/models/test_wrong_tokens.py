"""What the models, decoding and rollouts say to tokens that are no ids."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import models, params, rl
from jaxlab.decoding import SamplingParams, decode, prefill
from jaxlab.inference import generate
from jaxlab.mixers import attention, gla
from jaxlab.models import LMConfig

B, T, W = 2, 3, 16
CFG = LMConfig(
    vocab_size=W,
    width=8,
    n_layers=2,
    pattern=(gla.Config(8, n_heads=2), attention.Config(8, n_heads=2)),
)
PARAMS = params.abstract(models.spec(CFG))
KEY, HOW = jax.random.key(0), SamplingParams(max_tokens=2)
TOKENS = np.ones((B, T), np.int32)
IDS, MASK = np.zeros((B, T), np.int32), np.ones((B, T), np.float32)

SEQUENCES = {
    "forward": lambda p, x: models.forward(p, x, CFG),
    "hidden": lambda p, x: models.hidden(p, x, CFG),
    "forward_with_auxiliary_loss": (
        lambda p, x: models.forward_with_auxiliary_loss(p, x, CFG)
    ),
    "hidden_with_auxiliary_loss": (
        lambda p, x: models.hidden_with_auxiliary_loss(p, x, CFG)
    ),
    "prefill": lambda p, x: prefill(p, x, CFG, max_tokens=2),
    "decode": lambda p, x: decode(p, x, CFG, HOW, KEY),
    "generate": lambda p, x: generate(p, x, CFG, HOW),
    "rl.sample": lambda p, x: rl.sample(p, x, IDS, KEY, CFG, max_tokens=2),
    "rl.log_probabilities of prompts": (
        lambda p, x: rl.log_probabilities(p, x, IDS, TOKENS, MASK, CFG)
    ),
    "rl.log_probabilities": (
        lambda p, x: rl.log_probabilities(p, TOKENS, IDS, x, MASK, CFG)
    ),
}
STEPS = {
    "step": lambda p, x: models.step(p, x, CFG, state()),
    "hidden_step": lambda p, x: models.hidden_step(p, x, CFG, state()),
}
CALLS = {name: (call, TOKENS) for name, call in SEQUENCES.items()} | {
    name: (call, TOKENS[:, 0]) for name, call in STEPS.items()
}
every_call = pytest.mark.parametrize("name", CALLS)


def state(batch=B, cfg=CFG):
    return models.init_state(cfg, batch, T)


def changed(tokens, value):
    """The last of the tokens is another."""
    tokens = tokens.copy()
    tokens.flat[-1] = value
    return tokens


@every_call
@pytest.mark.parametrize("value", (W, -1, 2**31 - 1))
@pytest.mark.parametrize("make", (np.asarray, jnp.asarray), ids=("numpy", "jax"))
def test_an_id_outside_the_vocabulary(make, value, name):
    """Before anything is compiled, and also where the parameters are traced."""
    call, tokens = CALLS[name]
    tokens = make(changed(tokens, value))
    place = ", ".join(str(size - 1) for size in tokens.shape)
    message = rf"\[{place}\] is {value}, but the model's ids are 0 to 15; encode with"
    with pytest.raises(ValueError, match=message):
        call(None, tokens)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p: call(p, tokens), PARAMS)


@every_call
def test_ids_of_the_vocabulary_are_taken(name):
    """The first and the last; and any that are traced."""
    call, tokens = CALLS[name]
    for ids in (changed(tokens, 0), changed(tokens, W - 1), tokens.astype(np.uint8)):
        jax.eval_shape(lambda p, ids=ids: call(p, ids), PARAMS)
    jax.eval_shape(call, PARAMS, changed(tokens, W))


@every_call
def test_tokens_that_are_no_integers(name):
    call, tokens = CALLS[name]
    kind = r"(tokens|prompts) "
    for wrong, message in (
        (tokens.astype(np.float32), "has dtype float32, but must hold integers"),
        (tokens.astype(bool), "has dtype bool, but must hold integers"),
        (tokens.tolist(), "is of type list, but must be an array of integers"),
        ("text", "is of type str, but must be an array"),
        (None, "is of type NoneType, but must be an array"),
        (1, "is of type int, but must be an array"),
    ):
        with pytest.raises(TypeError, match=kind + message):
            call(None, wrong)
    for wrong in (tokens[0], tokens[None]):
        with pytest.raises(ValueError, match=kind + "has shape .* must have the axes"):
            call(None, jnp.asarray(wrong))


def test_ids_of_padding_may_be_any():
    tokens, ids = changed(TOKENS[:, ::-1], -1)[:, ::-1], IDS.copy()
    ids[-1, 0] = -1

    def shapes(call):
        return jax.eval_shape(call, PARAMS)

    shapes(lambda p: models.forward(p, tokens, CFG, segment_ids=ids))
    shapes(lambda p: rl.sample(p, tokens, ids, KEY, CFG, max_tokens=2))
    mask = MASK.copy()
    mask[-1, -1] = 0
    behind = changed(TOKENS, 99)
    shapes(lambda p: rl.log_probabilities(p, TOKENS, IDS, behind, mask, CFG))
    with pytest.raises(ValueError, match=r"tokens\[1, 0\] is -1"):
        shapes(lambda p: models.forward(p, tokens, CFG, segment_ids=IDS))


# What is not of the tokens ------------------------------------------------------------


def without(name):
    return {key: w for key, w in PARAMS.items() if key != name}


OTHER = {
    "the vocabulary": {"vocab_size": 12},
    "the width": {"width": 16},
    "the layers": {"n_layers": 4},
    "the head": {"tie_embeddings": False},
    "the pattern": {"pattern": CFG.pattern * 2, "n_layers": 4},
}


@pytest.mark.parametrize("other", OTHER)
@pytest.mark.parametrize("name", CALLS)
def test_parameters_of_another_config(name, other):
    """Ids were clamped to a smaller vocabulary, and layers left out."""
    cfg = dataclasses.replace(CFG, **OTHER[other])
    small, large = (params.abstract(models.spec(c)) for c in (CFG, cfg))
    call, tokens = CALLS[name]
    needed = "but the model needs|The parameters have no 'blocks"
    if other not in ("the head", "the pattern"):  # which have more, and that is no harm
        with pytest.raises(ValueError, match=needed):
            jax.eval_shape(lambda p: call(p, tokens), large)
    if name == "forward":
        with pytest.raises(ValueError, match=needed + "|have no 'head'"):
            jax.eval_shape(lambda p: models.forward(p, tokens, cfg), small)


@pytest.mark.parametrize("weight", ("embedding", "final_norm", "blocks"))
def test_parameters_that_are_missing(weight):
    with pytest.raises(ValueError, match=f"The parameters have no '{weight}.*init"):
        jax.eval_shape(lambda p: models.forward(p, TOKENS, CFG), without(weight))


def test_a_state_of_another_model():
    one = LMConfig(W, 8, 2, (gla.Config(8, n_heads=2),))
    deep = LMConfig(W, 8, 4, CFG.pattern)
    for wrong in ({}, 3, state(cfg=one), state(cfg=deep)):
        for call in (
            lambda p, wrong=wrong: models.step(p, TOKENS[:, 0], CFG, wrong),
            lambda p, wrong=wrong: models.forward(p, TOKENS, CFG, state=wrong),
        ):
            message = "The state is not one of 2 layers in a pattern of 2; make one"
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(call, PARAMS)
    with pytest.raises(ValueError, match="A step needs a state, but it is None; begi"):
        models.step(None, TOKENS[:, 0], CFG, None)


@pytest.mark.parametrize(
    ("batch", "max_length", "message"),
    (
        (0, 3, "batch=0 must be at least 1"),
        (2, -1, "max_length=-1 must be at least 0"),
        (1.5, 3, "batch=1.5 must be a whole number"),
        (2, None, "max_length=None must be a whole number"),
    ),
)
def test_sizes_of_a_state(batch, max_length, message):
    with pytest.raises((TypeError, ValueError), match=message):
        models.init_state(CFG, batch, max_length)


def test_hidden_states_that_are_none():
    for x, error, message in (
        (np.ones((2, 9), np.float32), ValueError, r"x has shape \(2, 9\), .*width=8"),
        (np.ones((2, 8), int), TypeError, "x has dtype int64, but the hidden states"),
    ):
        with pytest.raises(error, match=message):
            models.logits(PARAMS, x, CFG)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"mask": MASK.tolist()}, "mask is of type list, but must be an array"),
        ({"mask": MASK[:, 1:]}, r"tokens \(2, 3\) and mask \(2, 2\) must have one sh"),
        ({"tokens": TOKENS[:0], "mask": MASK[:0]}, "as many rows for each of the prom"),
        ({"prompts": TOKENS[:0], "segment_ids": IDS[:0]}, r"have shape \(0, 3\)"),
        ({"temperature": np.inf}, "temperature=inf, but must be above 0 and finite"),
        ({"segment_ids": IDS - 1}, "Prompt 0 ends with padding"),
    ),
)
def test_completions_that_do_not_fit(changes, message):
    arguments = {"prompts": TOKENS, "segment_ids": IDS, "tokens": TOKENS, "mask": MASK}
    with pytest.raises((TypeError, ValueError), match=message):
        rl.log_probabilities(None, **arguments | changes, cfg=CFG)


@pytest.mark.parametrize("name", ("vocab_size", "width", "n_layers", "mlp_hidden"))
@pytest.mark.parametrize("value", (0, 2.5, "wide", True))
def test_sizes_of_a_model(value, name):
    settings = {"pattern": CFG.pattern[:1]} | {name: value}
    with pytest.raises((TypeError, ValueError), match=f"{name}='?{value}'? must be"):
        LMConfig(**settings)
