"""Settings of the optimizers of optax, against optax and short formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.nn import initializers
from optax import contrib

from jaxlab import params
from jaxlab.optimizers import (
    LAMB,
    MKOR,
    SGD,
    SOAP,
    AdamW,
    Muon,
    Shampoo,
    WarmupCosine,
)
from jaxlab.optimizers.lamb import scale_by_layer_norms
from jaxlab.params import ParamSpec

RATE, STEPS = 0.1, 5
CONSTANT = WarmupCosine(warmup=0, end=1.0)
COMMON = {"learning_rate": RATE, "schedule": CONSTANT, "clip": 1e6}
NORMAL = initializers.normal(1.0)
SPECS = {
    "w": ParamSpec((6, 4), (None, None), NORMAL),
    "b": ParamSpec((4,), (None,), NORMAL, "bias"),
    "table": ParamSpec((5, 4), (None, None), NORMAL, "embedding"),
    "head": ParamSpec((4, 5), (None, None), NORMAL, "head"),
}
DECAYED = {"w": True, "b": False, "table": False, "head": True}


def run(optimizer, specs=SPECS, steps=STEPS):
    """The parameters after steps along random gradients, and these."""
    weights = params.init(specs, jax.random.key(0))
    gs = [params.init(specs, jax.random.key(n)) for n in range(1, steps + 1)]
    state = optimizer.init(weights)

    @jax.jit
    def step(weights, state, g):
        with jax.numpy_dtype_promotion("standard"):
            u, state = optimizer.update(g, state, weights)
        return optax.apply_updates(weights, u), state

    for g in gs:
        weights, state = step(weights, state, g)
    return weights, gs


def close(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        actual,
        expected,
    )


@pytest.mark.parametrize("clip", (1e6, 1.0))
def test_sgd(clip):
    settings = SGD(RATE, CONSTANT, weight_decay=0.1, momentum=0.8, clip=clip)
    found, gs = run(settings.build(SPECS, STEPS))
    start = params.init(SPECS, jax.random.key(0))
    weights = {name: np.float64(w) for name, w in start.items()}
    momentum = {name: 0.0 for name in SPECS}
    for g in gs:
        norm = np.sqrt(sum(np.sum(np.square(x)) for x in g.values()))
        for name, w in weights.items():
            clipped = np.float64(g[name]) * min(1, clip / norm)
            momentum[name] = 0.8 * momentum[name] + clipped
            weights[name] = w - RATE * (momentum[name] + 0.1 * w * DECAYED[name])
    close(found, weights)


def test_lamb_is_that_of_optax():
    found, _ = run(LAMB(weight_decay=0.1, **COMMON).build(SPECS, STEPS))
    theirs = optax.lamb(RATE, weight_decay=0.1, mask=DECAYED)
    close(found, run(theirs)[0])


def test_lamb_has_a_norm_for_each_layer_and_memory():
    """Every layer moves by the rate's share of its own norm."""
    memories = ParamSpec((2, 6, 4), (None, None, None), NORMAL)
    specs = {"layers": params.stack(SPECS, 3), "memories": memories}
    start = params.init(specs, jax.random.key(0))
    moved, _ = run(LAMB(weight_decay=0.1, **COMMON).build(specs, STEPS), specs, steps=1)
    share = jax.tree.map(
        lambda x, y: (
            np.linalg.norm((x - y).reshape(len(x), -1), axis=1)
            / np.linalg.norm(x.reshape(len(x), -1), axis=1)
        ),
        start,
        moved,
    )
    jax.tree.map(lambda x: np.testing.assert_allclose(x, RATE, rtol=1e-4), share)


def test_norms_of_weights_need_the_weights():
    g = {"b": jnp.ones(4)}
    with pytest.raises(ValueError, match="params is None; call update"):
        scale_by_layer_norms({"b": SPECS["b"]}).update(g, optax.EmptyState())


def test_muon_is_that_of_optax_and_adamw():
    settings = Muon(weight_decay=0.1, **COMMON)
    found, _ = run(settings.build(SPECS, STEPS))
    theirs, _ = run(contrib.muon(RATE, weight_decay=0.1, consistent_rms=0.2))
    adamw, _ = run(AdamW(weight_decay=0.1, **COMMON).build(SPECS, STEPS))
    close(found, adamw | {"w": theirs["w"]})


@pytest.mark.parametrize("of", (AdamW, SGD, Muon, Shampoo, SOAP))
def test_weights_decay_by_their_roles(of):
    """Without gradients nothing else moves them."""
    optimizer = of(weight_decay=0.5, **COMMON).build(SPECS, STEPS)
    weights = params.init(SPECS, jax.random.key(0))
    zero = jax.tree.map(jnp.zeros_like, weights)
    with jax.numpy_dtype_promotion("standard"):
        u, _ = optimizer.update(zero, optimizer.init(weights), weights)
    for name, w in weights.items():
        rate = RATE * 0.5 if DECAYED[name] else 0.0
        np.testing.assert_allclose(u[name], -rate * w, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "other"}, "variant='other' is not one of"),
        ({"decay": 0.999}, "set dtype='float32', or a smaller decay"),
        ({"excluded": ("(",)}, "The pattern '\\(' is no regular expression"),
        ({"biases": (("(", "x"),)}, "The pattern '\\(' is no regular expression"),
    ],
)
def test_settings_of_mkor_are_checked_where_they_are_made(settings, message):
    with pytest.raises(ValueError, match=message):
        MKOR(**settings)
