"""Shampoo against its recurrences in float64, and what follows from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn.initializers import zeros

from jaxlab import params
from jaxlab.optimizers.shampoo import Shampoo, scale_by_shampoo
from jaxlab.params import ParamSpec

IN, OUT, STEPS = 5, 4, 7
SPECS = {
    "w": ParamSpec((IN, OUT), (None, None)),
    "b": ParamSpec((OUT,), (None,), zeros, "bias"),
    "table": ParamSpec((7, IN), (None, None), role="embedding"),
}
SETTINGS = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "ridge": 1e-2}


def gradients(seed=0, steps=STEPS, specs=SPECS):
    rng = np.random.default_rng(seed)
    return [
        {name: rng.standard_normal(spec.shape) for name, spec in specs.items()}
        for _ in range(steps)
    ]


def run(tx, gs):
    """The updates of all steps, in float64."""
    update = jax.jit(tx.update)
    state, found = tx.init(gs[0]), []
    for g in gs:
        u, state = update(jax.tree.map(jnp.float32, g), state)
        found.append(jax.tree.map(lambda x: np.asarray(x, np.float64), u))
    return found


def unit(x):
    return x / np.linalg.norm(x)


def rotation(n, rng):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


# The formulas -------------------------------------------------------------------------


def adam(gs, b1, b2, eps, **_):
    """The mean and the update of each step."""
    m = v = 0.0
    for t, g in enumerate(gs, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        yield m, m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


def inverse_root(F, ridge, root):
    U, s, _ = np.linalg.svd(F)
    return U @ np.diag((s + ridge * s.max()) ** (-1 / root)) @ U.T


def shampoo(gs, period, left=True, ridge=1e-6, **settings):
    """Algorithm 1 of Gupta et al. with averages for sums, and Adam's length."""
    L, R, b2 = np.zeros((IN, IN)), np.zeros((OUT, OUT)), settings["b2"]
    A = B = None
    for n, (g, (m, a)) in enumerate(zip(gs, adam(gs, **settings), strict=True)):
        L, R = b2 * L + (1 - b2) * g @ g.T, b2 * R + (1 - b2) * g.T @ g
        if n % period == 0:
            A = inverse_root(L, ridge, 4) if left else np.eye(IN)
            B = inverse_root(R, ridge, 4 if left else 2)
        yield unit(A @ m @ B) * np.linalg.norm(a)


@pytest.mark.parametrize("period", (1, 3))
@pytest.mark.parametrize("largest", (IN, OUT), ids=("both sides", "right side"))
def test_updates_are_those_of_the_recurrences(period, largest):
    tx = scale_by_shampoo(SPECS, period=period, largest=largest, **SETTINGS)
    gs = gradients()
    found = run(tx, gs)
    want = shampoo([g["w"] for g in gs], period, left=largest == IN, **SETTINGS)
    for u, w in zip(found, want, strict=True):
        np.testing.assert_allclose(u["w"], w, rtol=1e-4, atol=1e-5)
    for name in ("b", "table"):
        want = adam([g[name] for g in gs], **SETTINGS)
        for u, (_, a) in zip(found, want, strict=True):
            np.testing.assert_allclose(u[name], a, rtol=1e-5, atol=1e-6)


def test_a_weight_with_two_large_sides_gets_adam():
    gs = gradients()
    found = run(scale_by_shampoo(SPECS, largest=OUT - 1, **SETTINGS), gs)
    want = adam([g["w"] for g in gs], **SETTINGS)
    for u, (_, a) in zip(found, want, strict=True):
        np.testing.assert_allclose(u["w"], a, rtol=1e-5, atol=1e-6)


def test_the_first_direction_is_the_gradient_with_equal_singular_values():
    """(G G^T)^-1/4 G (G^T G)^-1/4 = U V^T for G = U S V^T."""
    (g,) = gradients(steps=1)
    (u,) = run(scale_by_shampoo(SPECS), [g])
    U, _, V = np.linalg.svd(g["w"], full_matrices=False)
    np.testing.assert_allclose(unit(u["w"]), unit(U @ V), atol=1e-4)
    assert np.linalg.norm(u["w"]) == pytest.approx(np.sqrt(IN * OUT), rel=1e-5)


def test_roots_change_every_period():
    tx = scale_by_shampoo(SPECS, period=3)
    update, state, seen = jax.jit(tx.update), tx.init(gradients()[0]), []
    for g in gradients():
        _, state = update(jax.tree.map(jnp.float32, g), state)
        seen.append([np.asarray(root) for root in state.roots["w"]])
    for side in (0, 1):
        pairs = zip(seen, seen[1:], strict=False)
        changed = [bool((x[side] != y[side]).any()) for x, y in pairs]
        assert changed == [False, False, True, False, False, True]


# What follows from them ---------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_rotated_problem_has_the_rotated_direction(seed):
    """Whatever the orthogonal P and Q: Adam's direction, for one, does not rotate."""
    rng, specs = np.random.default_rng(seed), {"w": SPECS["w"]}
    P, Q = rotation(IN, rng), rotation(OUT, rng)
    gs = gradients(seed, specs=specs)
    rotated = [{"w": P.T @ g["w"] @ Q} for g in gs]
    tx = scale_by_shampoo(specs, period=2, ridge=1e-2)
    for u, v in zip(run(tx, gs), run(tx, rotated), strict=True):
        np.testing.assert_allclose(unit(v["w"]), unit(P.T @ u["w"] @ Q), atol=1e-4)
    *_, (_, a) = adam([g["w"] for g in gs], **SETTINGS)
    *_, (_, b) = adam([g["w"] for g in rotated], **SETTINGS)
    assert np.abs(unit(b) - unit(P.T @ a @ Q)).max() > 0.05


@pytest.mark.parametrize("scale", (1e-6, 1e6))
def test_the_scale_of_the_gradients_does_not_matter(scale):
    gs = gradients()
    tx = scale_by_shampoo(SPECS, eps=1e-30, ridge=1e-2)
    scaled = [jax.tree.map(lambda g: scale * g, g) for g in gs]
    for u, v in zip(run(tx, gs), run(tx, scaled), strict=True):
        np.testing.assert_allclose(u["w"], v["w"], rtol=1e-4, atol=1e-5)


def test_each_layer_of_a_stack_has_the_length_of_its_adam():
    specs = params.stack({"w": SPECS["w"]}, 3)
    size = np.array([1e-3, 1.0, 1e3])[:, None, None]
    gs = [{"w": size * g["w"]} for g in gradients(specs=specs)]
    found = run(scale_by_shampoo(specs, **SETTINGS), gs)
    want = adam([g["w"] for g in gs], **SETTINGS)
    for u, (_, a) in zip(found, want, strict=True):
        lengths = [np.linalg.norm(x, axis=(-2, -1)) for x in (u["w"], a)]
        np.testing.assert_allclose(*lengths, rtol=1e-5)


def test_gradients_of_zero_stay_zero():
    zero = jax.tree.map(np.zeros_like, gradients(steps=1)[0])
    for u in run(scale_by_shampoo(SPECS), [zero] * 2):
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), u)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"b1": 1.0}, "b1=1.0 must be at least 0 and below 1; it is the share"),
        ({"b2": -0.1}, "b2=-0.1 must be at least 0 and below 1"),
        ({"eps": 0.0}, "eps=0.0 must be finite and above 0"),
        ({"ridge": 0.0}, "ridge=0.0 must be finite and above 0"),
        ({"period": 0}, "period=0 must be a whole number of steps, at least 1"),
        ({"largest": 0}, "largest=0 must be a whole number, at least 1; it is the"),
    ),
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        scale_by_shampoo(SPECS, **change)
    with pytest.raises(ValueError, match=message):
        Shampoo(**change).build(SPECS, 1000)
