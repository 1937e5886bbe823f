"""AdaGrad against float64, and a batch that grows as the norm test asks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.optimizers import (
    AdAdaGrad,
    BatchController,
    BatchGrowth,
    BatchState,
    gradient_variance,
    scale_by_adagrad,
    scale_by_adagrad_norm,
    wanted_batch,
)
from jaxlab.params import ParamSpec

SPECS = {
    "w": ParamSpec((4, 3), (None, None)),
    "b": ParamSpec((3,), (None,), role="bias"),
}


def gradients(rng, dtype=jnp.float32):
    return {
        n: jnp.asarray(rng.standard_normal(s.shape), dtype) for n, s in SPECS.items()
    }


# The updates --------------------------------------------------------------------------


@pytest.mark.parametrize("jitted", (False, True))
def test_updates_are_the_oracles(jitted):
    rng, initial = np.random.default_rng(0), 0.25
    by_coordinate, by_norm = scale_by_adagrad(initial), scale_by_adagrad_norm(initial)
    states = by_coordinate.init(gradients(rng)), by_norm.init(None)
    wrap = jax.jit if jitted else lambda f: f
    first, second = wrap(by_coordinate.update), wrap(by_norm.update)
    v = {name: np.full(s.shape, initial) for name, s in SPECS.items()}
    b_squared = initial
    for _ in range(20):
        g = gradients(rng)
        u, coordinates = first(g, states[0])
        n, norm = second(g, states[1])
        states = coordinates, norm
        wide = {name: np.asarray(x, np.float64) for name, x in g.items()}
        b_squared += sum((x**2).sum() for x in wide.values())
        for name, x in wide.items():
            v[name] = v[name] + x**2
            np.testing.assert_allclose(u[name], x / np.sqrt(v[name]), rtol=2e-6)
            np.testing.assert_allclose(n[name], x / np.sqrt(b_squared), rtol=2e-6)
    np.testing.assert_allclose(states[1].square, b_squared, rtol=1e-6)


@pytest.mark.parametrize("scale", (scale_by_adagrad, scale_by_adagrad_norm))
def test_sums_are_float32_and_zeros_stay(scale):
    """A bfloat16 sum would stop growing after 256 equal terms."""
    tx, g = (
        scale(),
        {"w": jnp.ones((1, 2), jnp.bfloat16) * jnp.array([[1, 0]], "bfloat16")},
    )
    state = tx.init(g)

    def step(state, _):
        u, state = tx.update(g, state)
        return state, u["w"]

    state, u = jax.jit(lambda s: jax.lax.scan(step, s, length=1000))(state)
    assert u.dtype == jnp.bfloat16
    np.testing.assert_array_equal(u[:, 0, 1], 0)
    np.testing.assert_allclose(u[-1, 0, 0].astype(jnp.float32), 1000**-0.5, rtol=4e-3)


@pytest.mark.parametrize("variant", ("coordinates", "norm"))
def test_settings_decay_matrices_alone(variant):
    settings = AdAdaGrad(learning_rate=0.5, variant=variant, weight_decay=0.1, clip=1e3)
    tx, g = settings.build(SPECS, 1000), gradients(np.random.default_rng(1))
    weights = jax.tree.map(jnp.ones_like, g)
    state = tx.init(weights)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(2):  # the schedule is at 0, then at a hundredth of the peak
            u, state = tx.update(g, state, weights)
    norm = math.sqrt(2 * sum(float((x**2).sum()) for x in g.values()))
    for name, x in g.items():
        part = np.sign(x) / math.sqrt(2) if variant == "coordinates" else x / norm
        want = -0.005 * (part + 0.1 * (name == "w"))
        np.testing.assert_allclose(u[name], want, rtol=1e-5)


# The norm test ------------------------------------------------------------------------


def test_two_numbers_give_the_variance_of_the_groups():
    """Accumulated parts of different weight, as a training step has them."""
    rng, groups, rows = np.random.default_rng(2), 4, 6
    x = jnp.asarray(rng.standard_normal((groups, rows, 5)), jnp.float32)
    y = jnp.asarray(rng.standard_normal((groups, rows)), jnp.float32)
    weights = jnp.asarray(rng.integers(0, 2, (groups, rows)), jnp.float32)
    at = jnp.asarray(rng.standard_normal(5), jnp.float32)

    def loss(at, x, y, weights):
        return jnp.sum(weights * (x @ at - y) ** 2)

    def add(sums, part):
        g = jax.grad(loss)(at, *part)
        return (sums[0] + g, sums[1] + jnp.sum(g**2)), None

    start = jnp.zeros(5), jnp.zeros(())
    (total, squares), _ = jax.lax.scan(add, start, (x, y, weights))
    weight = jnp.sum(weights)
    mean_square = jnp.sum((total / weight) ** 2)
    found = gradient_variance(
        float((groups / weight) ** 2 * squares), float(mean_square), groups, 24
    )
    rows_of = 2 * np.einsum("gr,gri,gr->gi", weights, x, x @ at - y)
    g = np.asarray(rows_of, np.float64) * groups / float(weight)
    spread = ((g - g.mean(axis=0)) ** 2).sum()
    assert found == pytest.approx(rows / (groups - 1) * spread, rel=1e-4)


@pytest.mark.parametrize("groups", (2, 8, 64))
def test_wanted_batch_of_a_quadratic(groups):
    """Its gradient is x and its rows' noise has the covariance A A^T."""
    rng, batch, size, eta, repeats = np.random.default_rng(groups), 256, 40, 0.1, 400
    A = rng.standard_normal((size, size)) * np.linspace(0.02, 0.2, size)
    x = 0.4 * rng.standard_normal(size)
    want = np.trace(A @ A.T) / (eta**2 * (x @ x))
    assert batch < want < 4 * batch
    found = []
    for _ in range(repeats):
        rows = x + rng.standard_normal((batch, size)) @ A.T
        parts = rows.reshape(groups, -1, size).mean(axis=1)
        mean_square = (parts.mean(axis=0) ** 2).sum()
        variance = gradient_variance((parts**2).sum(), mean_square, groups, batch)
        found.append(wanted_batch(variance, mean_square, eta))
    assert np.mean(found) == pytest.approx(want, rel=0.1)


def test_noise_or_gradient_alone():
    assert wanted_batch(0.0, 0.0, 0.1) == wanted_batch(0.0, 2.0, 0.1) == 0
    assert wanted_batch(1.0, 0.0, 0.1) == math.inf
    assert gradient_variance(4 * 0.25 - 1e-9, 0.25, 4, 8) == 0  # by rounding below 0
    controller = BatchGrowth(largest=64).build(8, 4)
    state = controller.init()
    assert controller.update(state, 4 * 0.25, 0.25, 4) == state
    assert controller.update(state, 1.0, 0.0, 4) == BatchState(64)


# The controller -----------------------------------------------------------------------


def test_batches_are_powers_of_two_of_micro_batches():
    controller = BatchGrowth(largest=96).build(12, 4)
    wanted = (12, 13, 24, 25, 47, 48, 49, 96)
    rows = [controller.rows(BatchState(n)) for n in wanted]
    assert rows == [12, 24, 24, 48, 48, 48, 96, 96]
    assert [controller.parts(BatchState(n)) for n in wanted] == [n // 3 for n in rows]


def test_what_the_test_decides():
    """V = 8 / 2 / 1 * (2.5 - 2) = 2, and the limit V / (eta^2 ||g||^2) = 2 / eta^2."""
    for eta, wanted in ((0.6, 8), (0.5, 8), (0.49, 9), (0.25, 32), (0.1, 64)):
        controller = BatchGrowth(eta, largest=64).build(8, 2)
        state = controller.update(controller.init(), 2.5, 1.0, 2)
        assert state == BatchState(wanted)


def test_batch_grows_as_the_gradient_vanishes():
    """Descent of ||x||^2 / 2 from 10 with noise of variance 10 in all."""
    rng, size, eta = np.random.default_rng(3), 10, 0.5
    controller = BatchGrowth(eta, largest=512).build(8, 2)
    tx = scale_by_adagrad_norm(1.0)
    state, x = controller.init(), np.zeros(size)
    x[0], memory, batches = 10.0, tx.init(None), []
    for _ in range(60):
        groups = controller.parts(state)
        batches.append(controller.rows(state))
        rows = x + rng.standard_normal((groups * 4, size))
        parts = rows.reshape(groups, 4, size).mean(axis=1)
        g = parts.mean(axis=0)
        state = controller.update(state, (parts**2).sum(), (g**2).sum(), groups)
        u, memory = tx.update(jnp.asarray(g, jnp.float32), memory)
        x = x - 3.0 * np.asarray(u, np.float64)
    assert batches == sorted(batches) and batches[0] == 8
    assert set(batches) <= {8, 16, 32, 64, 128, 256, 512}
    assert batches[5] == 8 and batches[-1] == 512 and np.linalg.norm(x) < 0.2


# What cannot be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "batch", "message"),
    (
        ({"eta": 1.0}, (8, 2), "eta=1.0 must be between 0 and 1"),
        (
            {"largest": 0},
            (8, 2),
            "largest=0 must be a whole number of rows, at least 1",
        ),
        ({}, (8, 1), "accumulate=1 leaves one; set accumulate to 2 or more"),
        ({}, (12, 3), "batch=12 rows are not 1, 2, 4, 8, ... parts of 4 rows"),
        ({}, (9, 2), "A batch of 9 rows does not divide into accumulate=2"),
        ({"largest": 100}, (8, 2), "largest=100 rows are not 1, 2, 4, 8"),
        ({"largest": 8}, (16, 4), "A first batch of 16 rows is above largest=8; a"),
    ),
)
def test_batches_that_cannot_be(change, batch, message):
    with pytest.raises(ValueError, match=message):
        BatchGrowth(**change).build(*batch)


@pytest.mark.parametrize(
    ("squares", "mean_square", "groups", "message"),
    (
        (1.0, 0.5, 1, "groups=1; accumulate at least 2 micro-batches"),
        (math.nan, 0.5, 2, "squares=nan must be finite and at least 0"),
        (1.0, math.inf, 2, "mean_square=inf must be finite and at least 0"),
        (-1.0, 0.5, 2, "squares=-1.0"),
    ),
)
def test_numbers_that_cannot_be(squares, mean_square, groups, message):
    controller = BatchController(0.2, 8, 64, 4)
    with pytest.raises(ValueError, match=message):
        controller.update(controller.init(), squares, mean_square, groups)


@pytest.mark.parametrize("scale", (scale_by_adagrad, scale_by_adagrad_norm))
def test_updates_that_cannot_be(scale):
    with pytest.raises(ValueError, match="initial=0.0 must be finite and above 0"):
        scale(0.0)
    with pytest.raises(ValueError, match="variant='full' is not one of"):
        AdAdaGrad(variant="full").build(SPECS, 1000)
