"""FRUGAL is AdamW and signSGD at its ends, and follows the paper between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn.initializers import zeros
from jax.sharding import NamedSharding, PartitionSpec

from configs.tiny import config as tiny
from jaxlab import models, params
from jaxlab.optimizers import FRUGAL, AdamW, WarmupCosine, scale_by_frugal, state_bytes
from jaxlab.params import MeshConfig, ParamSpec, make_mesh

SPECS = {
    "layers": {"w": ParamSpec((3, 6, 8), ("layers", "width", "heads"))},
    "wide": ParamSpec((5, 20), (None, None)),
    "twin": ParamSpec((5, 20), (None, None)),
    "table": ParamSpec((7, 4), (None, None), role="embedding"),
    "head": ParamSpec((4, 7), (None, None), role="head"),
    "filter": ParamSpec((4, 8), (None, None), role="convolution"),
    "bias": ParamSpec((8,), (None,), zeros, "bias"),
}
MATRICES = {"layers/w": 2, "twin": 6, "wide": 6}  # columns of density 0.3
STEPS = 6


def gradients(seed, dtype=jnp.float32):
    key = jax.random.key(seed)
    return jax.tree.map(
        lambda s: jax.random.normal(
            jax.random.fold_in(key, s.shape[-1]), s.shape, dtype
        ),
        SPECS,
    )


def run(settings, steps):
    """The weights after each step."""
    optimizer = settings.build(SPECS, 100)
    weights = params.init(SPECS, jax.random.key(1))
    state, seen, update = optimizer.init(weights), [], jax.jit(optimizer.update)
    for seed in range(steps):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = update(gradients(seed), state, weights)
        weights = jax.tree.map(jnp.add, weights, updates)
        seen.append(weights)
    return seen


def by_name(tree):
    return {name: np.asarray(x, np.float64) for name, x in params.named_leaves(tree)}


# The two ends -------------------------------------------------------------------------


def test_density_1_is_adamw_for_one_period():
    """Up to a few roundings of an update and one of a weight, both about 1, a step."""
    rate = 0.1
    same = dict(learning_rate=rate, schedule=WarmupCosine(warmup=2), weight_decay=0.3)
    whole = FRUGAL(density=1.0, period=STEPS, **same)
    found, want = run(whole, STEPS + 1), run(AdamW(**same), STEPS + 1)
    for step, pair in enumerate(zip(found[:STEPS], want[:STEPS], strict=True)):
        a, b = map(by_name, pair)
        for name in a:
            bound = (4 * rate + 1) * step * np.finfo(np.float32).eps
            np.testing.assert_allclose(a[name], b[name], rtol=0, atol=bound)
    a, b = by_name(found[STEPS]), by_name(want[STEPS])
    changed = [name for name in a if np.abs(a[name] - b[name]).max() > 0.01]
    assert changed == list(MATRICES)  # their moments started over


def test_density_0_is_the_sign_on_matrices():
    tx = scale_by_frugal(SPECS, density=0.0, period=2, free_scale=0.5)
    state = tx.init(params.init(SPECS, jax.random.key(1)))
    for seed in range(5):
        g = gradients(seed)
        u, state = tx.update(g, state)
        np.testing.assert_array_equal(u["wide"], 0.5 * np.sign(g["wide"]))
        np.testing.assert_array_equal(u["layers"]["w"], 0.5 * np.sign(g["layers"]["w"]))
    assert state.mu["wide"].size == state.nu["layers"]["w"].size == 0
    assert state.mu["head"].shape == (4, 7)


# Between them -------------------------------------------------------------------------


class Oracle:
    """Adam of one array in float64."""

    def __init__(self, b1=0.9, b2=0.95, eps=1e-8):
        self.b1, self.b2, self.eps, self.t, self.m, self.v = b1, b2, eps, 0, 0.0, 0.0

    def __call__(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        m, v = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        return m / (np.sqrt(v) + self.eps)


def test_two_periods_are_the_oracles():
    """The columns are read from the first step of a period, when Adam's is a sign."""
    period, scale = 4, 0.5
    tx = scale_by_frugal(SPECS, density=0.3, period=period, free_scale=scale)
    state = tx.init(params.init(SPECS, jax.random.key(1)))
    whole = {name: Oracle() for name, _ in params.named_leaves(SPECS)}
    adam, columns = {}, {}
    for step in range(2 * period):
        g = gradients(step)
        updates, state = tx.update(g, state)
        u, g = by_name(updates), by_name(g)
        for name in whole:
            if name not in MATRICES:
                want = whole[name](g[name])
                np.testing.assert_allclose(u[name], want, rtol=2e-5, atol=1e-6)
        for name in MATRICES:
            rows = [x.reshape(-1, *x.shape[-2:]) for x in (u[name], g[name])]
            for layer, (u_layer, g_layer) in enumerate(zip(*rows, strict=True)):
                at = name, layer
                if step % period == 0:
                    columns[at] = np.flatnonzero(np.abs(u_layer).min(axis=0) > 0.75)
                    assert len(columns[at]) == MATRICES[name]
                    adam[at] = Oracle()
                want = scale * np.sign(g_layer)
                want[:, columns[at]] = adam[at](g_layer[:, columns[at]])
                np.testing.assert_allclose(u_layer, want, rtol=2e-5, atol=1e-6)


def draws(count, period=3, name="wide", **settings):
    """Which columns are active in each of many draws ``[count, *stack, out]``."""
    tx = scale_by_frugal(SPECS, density=0.3, period=period, free_scale=0.5, **settings)
    state, g = tx.init(params.init(SPECS, jax.random.key(1))), gradients(0)

    def active(draw):
        u, _ = tx.update(g, state._replace(count=draw * period))
        return jnp.abs(dict(params.named_leaves(u))[name]).min(axis=-2) > 0.75

    return np.asarray(jax.jit(jax.vmap(active))(jnp.arange(count)))


def test_every_column_is_drawn_as_often():
    count, share = 4000, 6 / 20
    found = draws(count)
    assert (found.sum(axis=-1) == 6).all()
    sigma = np.sqrt(count * share * (1 - share))
    assert np.abs(found.sum(axis=0) - count * share).max() < 4.5 * sigma
    pairs = np.einsum("di,dj->ij", found, found, dtype=float)[~np.eye(20, dtype=bool)]
    both = count * share * 5 / 19
    assert np.abs(pairs - both).max() < 5 * np.sqrt(both)


def test_layers_matrices_draws_and_seeds_differ():
    layers = draws(40, name="layers/w")
    for other in (layers[:, [1, 2, 0]], layers[[*range(1, 40), 0]]):
        assert 0.5 < (layers != other).any(axis=-1).mean() < 1
    assert (draws(40, seed=1) != draws(40)).any(axis=-1).mean() > 0.5
    assert (draws(40, name="twin") != draws(40)).any(axis=-1).mean() > 0.5
    np.testing.assert_array_equal(draws(40), draws(40))


# Its state ----------------------------------------------------------------------------


def test_state_is_as_small_as_the_density_says():
    specs = models.spec(tiny.model)
    adamw = state_bytes(tiny.optimizer.build(specs, 500), specs)
    assert adamw == 2 * 4 * params.count(specs) + 2 * 4  # and two counts of steps
    found = state_bytes(FRUGAL(density=0.25).build(specs, 500), specs)
    kept = sum(
        params.count(s) // (4 if s.role == "matrix" else 1)
        for s in jax.tree.leaves(specs)
    )
    assert found == 2 * 4 * kept + 2 * 4
    assert found / adamw == pytest.approx(0.278, abs=5e-4)


def test_one_program_serves_every_period():
    tx = scale_by_frugal(SPECS, period=2)
    update = jax.jit(tx.update)
    state = tx.init(params.init(SPECS, jax.random.key(1)))
    shapes = jax.eval_shape(lambda: state)
    for seed in range(5):
        _, state = update(gradients(seed), state)
    assert update._cache_size() == 1 and int(state.count) == 5
    assert jax.eval_shape(lambda: state) == shapes
    assert state.mu["layers"]["w"].shape == (3, 6, 2)


def test_narrow_types_stay():
    specs = {"w": ParamSpec((4, 8), (None, None), dtype=jnp.bfloat16)}
    tx = scale_by_frugal(specs)
    state = tx.init(params.init(specs, jax.random.key(0)))
    u, after = tx.update({"w": jnp.ones((4, 8), jnp.float32)}, state)
    assert u["w"].dtype == jnp.float32
    assert after.mu["w"].dtype == state.mu["w"].dtype == jnp.bfloat16
    assert after.nu["w"].dtype == jnp.bfloat16


def test_a_mesh_changes_nothing():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    tx = scale_by_frugal(SPECS, period=2, density=0.5)
    weights = params.init(SPECS, jax.random.key(1))
    split = params.shardings(SPECS, mesh)
    state = tx.init(weights)
    whole = NamedSharding(mesh, PartitionSpec())
    spread = jax.device_put(state, type(state)(whole, split, split))
    update = jax.jit(tx.update)
    before = jax.tree.map(lambda x: x.sharding, spread)
    for seed in range(3):
        g = gradients(seed)
        want, state = tx.update(g, state)
        found, spread = update(jax.device_put(g, split), spread)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            found,
            want,
        )
    kept = jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), spread, before
    )
    assert all(jax.tree.leaves(kept))
    assert spread.mu["layers"]["w"].addressable_shards[0].data.shape == (3, 3, 1)


# What cannot be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"density": 1.5}, r"density=1.5 must be in \[0, 1\]"),
        ({"period": 0}, "period=0 must be a whole number of steps, at least 1"),
        (
            {"free_scale": -1.0},
            "free_scale=-1.0 must be finite and at least 0; below 0",
        ),
    ),
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        scale_by_frugal(SPECS, **change)
