"""MKOR's factors against dense inverses in float64, and what surrounds them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.nn.initializers import zeros

from jaxlab import params
from jaxlab.config import from_json, to_json
from jaxlab.optimizers import MKOR, SGD, Switch, WarmupStableDecay, left_at
from jaxlab.optimizers.mkor import mkor, preconditioned, scale_by_mkor
from jaxlab.params import ParamSpec, Tap, linear

KEY = jax.random.key(0)
IN, OUT = 5, 3
SPECS = {
    "w": ParamSpec((IN, OUT), (None, None)),
    "b": ParamSpec((OUT,), (None,), zeros, "bias"),
    "table": ParamSpec((7, IN), (None, None), role="embedding"),
}
FLOAT32 = {"dtype": jnp.float32}


def taps(a, g, rows=1.0):
    tap = Tap(jnp.asarray(a, jnp.float32), jnp.asarray(g, jnp.float32), rows)
    tap = tap.replace(rows=jnp.full(tap.a.shape[:-1], rows, jnp.float32))
    return {"w": tap, "b": None, "table": None}


def gradients(seed=0):
    keys = dict(zip(SPECS, jax.random.split(jax.random.key(seed), 3), strict=True))
    return {name: jax.random.normal(keys[name], s.shape) for name, s in SPECS.items()}


def vectors(steps, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(IN), rng.standard_normal(OUT)) for _ in range(steps)]


def inverse(D):
    return np.eye(D.shape[-1]) - np.asarray(D, np.float64)


# The formulas -------------------------------------------------------------------------


def released(F, v, decay=0.95):
    """(P^-1 + v v^T)^-1, by dense inverses."""
    P = decay * F + (1 - decay) * np.eye(len(F))
    return np.linalg.inv(np.linalg.inv(P) + np.outer(v, v))


def exact(F, v, decay=0.95):
    """Of the moving average of v v^T, by dense inverses."""
    return np.linalg.inv(decay * np.linalg.inv(F) + (1 - decay) * np.outer(v, v))


def stabilised(F, v, decay=0.95):
    F = exact(F, v, decay)
    return 0.9 * F + 0.1 * np.eye(len(F)) if abs(F).sum(1).max() > 2.5 else F


@pytest.mark.parametrize(
    ("variant", "oracle", "threshold"),
    (
        ("released", released, 10.0),
        ("exact", exact, 1e9),
        ("exact", stabilised, 2.5),
    ),
    ids=("released", "exact", "stabilised"),
)
def test_factors_are_the_dense_inverses(variant, oracle, threshold):
    tx = scale_by_mkor(SPECS, variant=variant, threshold=threshold, **FLOAT32)
    state, g = tx.init(None), gradients()
    A, B = np.eye(IN), np.eye(OUT)
    for a, b in vectors(40):
        u, state = tx.update(g, state, stats=taps(6 * a, b, rows=6.0))
        A, B = oracle(A, a), oracle(B, b)
    found = state.deviations["w"]
    np.testing.assert_allclose(inverse(found.a), A, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(inverse(found.b), B, rtol=1e-5, atol=1e-5)
    G = np.asarray(g["w"], np.float64)
    want = A @ G @ B
    want *= np.linalg.norm(G) / np.linalg.norm(want)
    np.testing.assert_allclose(u["w"], want, rtol=1e-4, atol=1e-5)
    for name in ("b", "table"):
        np.testing.assert_array_equal(u[name], g[name])
    assert int(state.skipped) == 0 and int(state.count) == 40


HARD = {
    "one direction, small": lambda i, n: jnp.full(n, 1e-3),
    "one direction, large": lambda i, n: jnp.full(n, 100.0),
    "one axis": lambda i, n: jnp.where(jnp.arange(n) == 0, 1e4, 0.0),
    "axes in turn": lambda i, n: jnp.where(jnp.arange(n) == i % n, 30.0, 0.0),
    "random": lambda i, n: jax.random.normal(jax.random.fold_in(KEY, i), (n,)),
    "random, large": lambda i, n: (
        100 * jax.random.normal(jax.random.fold_in(KEY, i), (n,))
    ),
    "a mean and noise": lambda i, n: (
        3 + jax.random.normal(jax.random.fold_in(KEY, i), (n,))
    ),
    "nothing": lambda i, n: jnp.zeros(n),
}


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
def test_eigenvalues_stay_above_0_and_up_to_1(dtype):
    """For 10,000 steps of every hard input, all eigenvalues of what is stored."""
    n, every = 48, 500
    specs = {"w": ParamSpec((len(HARD), n, n), (None,) * 3)}
    tx = scale_by_mkor(specs, dtype=dtype)
    g = {"w": jnp.ones((len(HARD), n, n))}

    def step(state, i):
        v = jnp.stack([hard(i, n).astype(jnp.float32) for hard in HARD.values()])
        stats = {"w": Tap(v, v, jnp.ones(len(HARD)))}
        return tx.update(g, state, stats=stats)[1], None

    @jax.jit
    def steps(state, first):
        return jax.lax.scan(step, state, first + jnp.arange(every))[0]

    state = tx.init(None)
    for first in range(0, 10_000, every):
        state = steps(state, jnp.int32(first))
        for deviation in state.deviations["w"]:
            found = np.linalg.eigvalsh(inverse(deviation))
            for name, values in zip(HARD, found, strict=True):
                assert values.min() > 0, (name, first, values.min())
                assert values.max() <= 1 + 1e-12, (name, first, values.max())
    assert int(state.skipped) == 0


# What surrounds them ------------------------------------------------------------------


@pytest.mark.parametrize("base", (optax.adam, optax.lamb), ids=lambda f: f.__name__)
def test_identity_factors_are_the_base_optimizer_to_the_bit(base):
    weights = gradients(1)
    plain, mkor = base(1e-2), optax.chain(scale_by_mkor(SPECS), base(1e-2))
    states = plain.init(weights), mkor.init(weights)
    nothing = taps(np.zeros(IN), np.zeros(OUT))
    for seed in range(3):
        g = gradients(seed)
        with jax.numpy_dtype_promotion("standard"):
            want, first = plain.update(g, states[0], weights)
            got, second = mkor.update(g, states[1], weights, stats=nothing)
        states = first, second
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_bias_is_a_row_whose_input_is_1():
    tx = scale_by_mkor(SPECS, biases=[("w", "b")], **FLOAT32)
    whole = {"w": ParamSpec((IN + 1, OUT), (None, None))}
    joint = scale_by_mkor(whole, **FLOAT32)
    state, other = tx.init(None), joint.init(None)
    for seed, (a, b) in enumerate(vectors(5)):
        g = gradients(seed)
        u, state = tx.update(g, state, stats=taps(2 * a, b, rows=2.0))
        rows = jnp.concatenate([g["w"], g["b"][None]])
        stats = {"w": taps([*(2 * a), 2.0], b, rows=2.0)["w"]}
        v, other = joint.update({"w": rows}, other, stats=stats)
        np.testing.assert_array_equal(u["w"], v["w"][:-1])
        np.testing.assert_array_equal(u["b"], v["w"][-1])
        norms = [np.linalg.norm(x) for x in (rows, v["w"])]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_settings_reach_the_transformation_and_survive_json():
    """Biases, and the threshold and blend of factors that grow along what they lack."""
    base = SGD(0.1, WarmupStableDecay(warmup=0, decay=0.0), momentum=0.0, clip=1e9)
    own = {"variant": "exact", "threshold": 1.5, "blend": 0.6, "biases": (("w", "b"),)}
    settings = MKOR(base=base, dtype="float32", **own)
    assert from_json(json.loads(json.dumps(to_json(settings)))) == settings
    weights = gradients(1)
    tx = settings.build(SPECS, 10)

    def base_of(rate):
        return dataclasses.replace(base, learning_rate=rate).build(SPECS, 10)

    same = mkor(0.1, base=base_of, specs=SPECS, **own, **FLOAT32)
    of_defaults = {"variant": "exact", "biases": own["biases"]}
    other = mkor(0.1, base=base_of, specs=SPECS, **of_defaults, **FLOAT32)
    states = [x.init(weights) for x in (tx, same, other)]
    for seed, (a, b) in enumerate(vectors(12)):
        g, found = gradients(seed), []
        for i, x in enumerate((tx, same, other)):
            with jax.numpy_dtype_promotion("standard"):
                u, states[i] = x.update(g, states[i], weights, stats=taps(a, b))
            found.append(u)
        jax.tree.map(np.testing.assert_array_equal, found[0], found[1])
    for name in ("w", "b"):
        assert np.abs(found[0][name] - found[2][name]).max() > 1e-3
    assert states[0][0].deviations["w"].a.shape == (IN + 1, IN + 1)


@pytest.mark.parametrize("variant", ("released", "exact"))
def test_stacked_layers_are_as_many_layers(variant):
    layers = 3
    stacked = params.stack({"w": SPECS["w"]}, layers)
    tx = scale_by_mkor(stacked, variant=variant)
    alone = scale_by_mkor({"w": SPECS["w"]}, variant=variant)
    state, states = tx.init(None), [alone.init(None) for _ in range(layers)]
    rng = np.random.default_rng(0)
    for _ in range(4):
        g = rng.standard_normal((layers, IN, OUT)).astype(np.float32)
        a, b = rng.standard_normal((layers, IN)), rng.standard_normal((layers, OUT))
        a[1] *= 50
        u, state = tx.update({"w": g}, state, stats={"w": taps(a, b)["w"]})
        for n in range(layers):
            stats = {"w": taps(a[n], b[n])["w"]}
            v, states[n] = alone.update({"w": g[n]}, states[n], stats=stats)
            np.testing.assert_allclose(u["w"][n], v["w"], rtol=1e-5, atol=1e-5)


def test_factors_change_every_period_without_another_program():
    tx = scale_by_mkor(SPECS, period=3)
    update = jax.jit(tx.update)
    state, seen = tx.init(None), []
    for a, b in vectors(7):
        _, state = update(gradients(), state, stats=taps(a, b))
        seen.append(np.asarray(state.deviations["w"].a, np.float32))
    changed = [bool((x != y).any()) for x, y in zip(seen, seen[1:], strict=False)]
    assert changed == [False, False, True, False, False, True]
    assert update._cache_size() == 1


def test_what_is_not_finite_is_skipped_and_counted():
    tx = scale_by_mkor(SPECS)
    _, state = tx.update(gradients(), tx.init(None), stats=taps(*vectors(1)[0]))
    for bad in (np.nan, np.inf, 1e30):
        a = np.ones(IN)
        a[2] = bad
        u, after = tx.update(gradients(), state, stats=taps(a, np.ones(OUT)))
        assert int(after.skipped) == 1
        np.testing.assert_array_equal(after.deviations["w"].a, state.deviations["w"].a)
        assert (
            np.asarray(after.deviations["w"].b) != np.asarray(state.deviations["w"].b)
        ).any()
        assert np.isfinite(u["w"]).all()


def test_gradients_of_zero_stay_zero():
    tx = scale_by_mkor(SPECS)
    zeros = jax.tree.map(jnp.zeros_like, gradients())
    u, _ = tx.update(zeros, tx.init(None), stats=taps(*vectors(1)[0]))
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), u)


def test_one_gradient_gives_the_statistics_of_a_loss():
    weights = params.init(SPECS, KEY)
    x = jax.random.normal(KEY, (4, IN))

    def loss(w):
        return jnp.sum(jnp.tanh(linear(x, w["w"]) + w["b"][None])) / 4

    g, stats = params.untap(jax.grad(loss)(params.tap(weights, preconditioned(SPECS))))
    jax.tree.map(np.testing.assert_array_equal, g, jax.grad(loss)(weights))
    assert stats["b"] is None and stats["table"] is None
    np.testing.assert_allclose(stats["w"].g, g["b"], rtol=1e-5)
    np.testing.assert_allclose(stats["w"].a, x.sum(0), rtol=1e-5)
    u, _ = scale_by_mkor(SPECS).update(g, scale_by_mkor(SPECS).init(None), stats=stats)
    assert jnp.abs(u["w"] - g["w"]).max() > 1e-3


def test_mkor_h_leaves_the_factors_to_its_base():
    """At the step of the rule, after which no factor is renewed."""
    base = SGD(0.1, WarmupStableDecay(warmup=0, decay=0.0), clip=1e9)
    switch = Switch(fast=0.5, slow=0.9, patience=2, warmup=0)
    settings = MKOR(base=base, switch=switch)
    assert settings.tapped(SPECS) == preconditioned(SPECS)
    tx, plain = settings.build(SPECS, 10), base.build(SPECS, 10)
    weights = gradients(1)
    state, other = tx.init(weights), plain.init(weights)
    for seed, (a, b) in enumerate(vectors(5)):
        g = gradients(seed)
        with jax.numpy_dtype_promotion("standard"):
            u, state = tx.update(
                *(g, state, weights), stats=taps(a, b), value=jnp.float32(1.0)
            )
            v, other = plain.update(g, other, weights)
        np.testing.assert_array_equal(u["b"], v["b"])
        assert float(jnp.abs(u["w"] - v["w"]).max()) > 0  # the momentum remembers
    assert left_at(state) == 2
    assert int(state[0].inner.count) == 2


# Errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"variant": "printed"}, "variant='printed' is not one of"),
        ({"decay": 1.0}, "decay=1.0 must be between 0 and 1"),
        ({"decay": 0.999}, "decay=0.999 is above 0.9922, the largest for"),
        ({"period": 0}, "period=0 must be a whole number of steps, at least 1"),
        ({"threshold": 0.5}, "threshold=0.5 must be finite and above 1"),
        ({"largest": 4}, r"w \(5, 3\) would have a factor above largest=4"),
        ({"excluded": ["w"]}, "No parameter is preconditioned"),
        ({"biases": [("w", "bias")]}, r"is None \(None: there is no such parameter"),
        ({"biases": [("w", "table")]}, r"its shape is \(7, 5\) .* must be \(3,\)"),
    ),
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        scale_by_mkor(SPECS, **change)


@pytest.mark.parametrize(
    ("stats", "message"),
    (
        (None, "MKOR needs statistics: differentiate with respect to tap"),
        ({"w": None, "b": None, "table": None}, "have no tap for w"),
        ({"b": None}, "have no tap for w .* give a tree like the parameters"),
        (
            taps(np.ones(IN + 1), np.ones(OUT)),
            r"has a of shape \(6,\), but it must be \(5,\); give the taps",
        ),
        (
            taps(np.ones(IN), np.ones(OUT)) | {"table": taps([1.0], [1.0])["w"]},
            "have a tap for table, which is not preconditioned",
        ),
    ),
)
def test_statistics_that_do_not_fit(stats, message):
    tx = scale_by_mkor(SPECS)
    with pytest.raises(ValueError, match=message):
        tx.update(gradients(), tx.init(None), stats=stats)


def test_factors_are_stored_in_bfloat16():
    state = scale_by_mkor(SPECS).init(None)
    found = [(x.shape, x.dtype) for x in state.deviations["w"]]
    assert found == [((n, n), jnp.bfloat16) for n in (IN, OUT)]
