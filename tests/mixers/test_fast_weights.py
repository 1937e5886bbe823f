"""One step of the fast weights: its closed form, Newton-Schulz, norms and rates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.mixers.lact.fast_weights import (
    NEWTON_SCHULZ,
    FastWeights,
    Rule,
    apply,
    ascent,
    newton_schulz,
    update,
    used,
)

B, H, C, D, F = 2, 3, 8, 6, 10


@functools.cache
def setup():
    keys = jax.random.split(jax.random.key(7), 6)
    initial = FastWeights(
        gate=jax.random.normal(keys[0], (H, D, F)) * D**-0.5,
        up=jax.random.normal(keys[1], (H, D, F)) * D**-0.5,
        down=jax.random.normal(keys[2], (H, F, D)) * F**-0.5,
    )
    W = jax.tree.map(lambda w: jnp.stack([w, 1.3 * w]), initial)
    k, v = (jax.random.normal(key, (B, H, C, D)) for key in keys[3:5])
    eta = jax.nn.softplus(jax.random.normal(keys[5], (B, H, C, 3)))
    return initial, W, k, v, eta


def test_closed_form_equals_the_gradient():
    _, W, k, v, eta = setup()
    rate = eta[..., :1]

    def loss(W):
        return -jnp.sum(rate * apply(W, k) * v)

    actual = ascent(W, k, v, jnp.broadcast_to(rate, eta.shape))
    for a, g in zip(actual, jax.grad(loss)(W), strict=True):
        np.testing.assert_allclose(a, -g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", range(3), ids=FastWeights._fields)
def test_each_rate_multiplies_its_own_matrix(which):
    _, W, k, v, eta = setup()
    alone = ascent(W, k, v, eta * jax.nn.one_hot(which, 3)[None, None, None])
    for i, (a, b) in enumerate(zip(alone, ascent(W, k, v, eta), strict=True)):
        np.testing.assert_allclose(a, b if i == which else 0 * b, rtol=1e-6)


def with_singular_values(s, m, n):
    rng = np.random.default_rng(len(s))
    u = np.linalg.qr(rng.normal(size=(m, m)))[0][:, : len(s)]
    w = np.linalg.qr(rng.normal(size=(n, n)))[0][:, : len(s)]
    return (u * s) @ w.T, u @ w.T


@pytest.mark.parametrize("shape", [(12, 12), (20, 12), (12, 20)], ids=str)
@pytest.mark.parametrize(
    ("name", "low", "high"), [("paper", 0.682, 1.134), ("schedule", 0.978, 1.032)]
)
def test_newton_schulz_bands(name, low, high, shape):
    """Singular values of at least 1% of the norm; the bands are of the polynomials."""
    s = np.geomspace(0.011, 1, 12)
    s = np.maximum(s, 0.011 * np.linalg.norm(s))
    G, polar = with_singular_values(s, *shape)
    stack = jnp.array([G, 1e-4 * G, 1e4 * G], jnp.float32)
    X = np.asarray(newton_schulz(stack, name))
    values = np.linalg.svd(X, compute_uv=False)
    assert low - 1e-3 <= values.min() and values.max() <= high + 1e-3
    np.testing.assert_allclose(X[1:], X[[0, 0]], atol=1e-3)  # the size is no matter
    assert np.linalg.norm(X[0] - polar, 2) <= max(1 - low, high - 1) + 1e-3
    # Each matrix of a stack is by itself.
    alone = newton_schulz(stack[:1], name)
    np.testing.assert_allclose(X[:1], alone, atol=1e-5)


def test_small_singular_values_are_not_lifted_to_one():
    G, _ = with_singular_values(np.array([1.0] * 5 + [1e-3 * 5**0.5]), 6, 6)
    values = np.linalg.svd(newton_schulz(jnp.array(G, jnp.float32)), compute_uv=False)
    assert 0.4 < values[-1] < 0.55


def test_newton_schulz_of_nothing():
    zero = jnp.zeros((2, 4, 6))
    assert not np.any(newton_schulz(zero))
    assert np.all(np.isfinite(jax.grad(lambda G: jnp.sum(newton_schulz(G)))(zero)))


def test_newton_schulz_of_bfloat16_factors():
    rng = np.random.default_rng(3)
    G = jnp.array(rng.normal(size=(4, 16, 48)), jnp.float32)
    exact, rounded = newton_schulz(G), newton_schulz(G, dtype=jnp.bfloat16)
    assert jnp.linalg.norm(rounded - exact) < 0.03 * jnp.linalg.norm(exact)


def step(rule, eta, momentum=False, W=None, beta=0.5):
    initial, W_default, k, v, _ = setup()
    W = W_default if W is None else W
    velocity = jax.tree.map(jnp.ones_like, W) if momentum else None
    beta = jnp.full((B, H), beta) if momentum else None
    return update(W, velocity, k, v, eta, beta, initial, rule)


@pytest.mark.parametrize("placement", ["post", "pre", "none"])
def test_without_rates_gradient_descent_does_nothing(placement):
    initial, _, _, _, eta = setup()
    W = jax.tree.map(lambda w: jnp.stack([w, w]), initial)
    rule = Rule("gradient_descent", placement)
    after, _ = step(rule, 0 * eta, W=W)
    for a, b in zip(used(after, initial, rule), W, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_muon_ignores_the_size_of_the_rates():
    _, W, _, _, eta = setup()
    steps = [step(Rule(), scale * eta)[0] for scale in (1.0, 1e-4, 100.0)]
    for one, *others in zip(*steps, strict=True):
        for other in others:
            assert jnp.linalg.norm(one - other) < 0.01 * jnp.linalg.norm(one)
    moved = jax.tree.map(lambda a, b: jnp.linalg.norm(a - b), steps[0], W)
    assert all(m > 0.1 for m in moved)


def test_gradient_descent_is_proportional_to_the_rates():
    _, W, _, _, eta = setup()
    rule = Rule("gradient_descent", "none")
    once, twice = (step(rule, scale * eta)[0] for scale in (1.0, 2.0))
    for a, b, w in zip(once, twice, W, strict=True):
        np.testing.assert_allclose(b - w, 2 * (a - w), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["gradient_descent", "muon"])
@pytest.mark.parametrize("placement", ["post", "pre"])
def test_norms_over_the_inputs_stay_as_learned(optimizer, placement):
    initial, _, _, _, eta = setup()
    rule = Rule(optimizer, placement)
    W, _ = step(rule, eta, momentum=True)
    for w, w_initial in zip(used(W, initial, rule), initial, strict=True):
        expected = np.linalg.norm(w_initial, axis=-2)
        np.testing.assert_allclose(
            np.linalg.norm(w, axis=-2), [expected] * B, rtol=1e-4
        )


def test_momentum_decays_what_was():
    """M <- beta M + D, without (1 - beta) and without Nesterov's look ahead."""
    _, W, k, v, eta = setup()
    new, velocity = step(Rule("gradient_descent", "none"), eta, momentum=True, beta=0.9)
    assert velocity is not None
    for m, d, a, w in zip(velocity, ascent(W, k, v, eta), new, W, strict=True):
        np.testing.assert_allclose(m, 0.9 + d, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(a, w + m, rtol=1e-5, atol=1e-5)


def test_unknown_names():
    for name in ("optimizer", "norm_placement", "newton_schulz"):
        with pytest.raises(ValueError, match=f"{name}='adam' is not one of"):
            Rule(**{name: "adam"})
    assert set(NEWTON_SCHULZ) == {"paper", "schedule"}
