"""The laws that every optimizer obeys. A new one is one more line of OPTIMIZERS."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.nn import initializers

from jaxlab import models, params
from jaxlab.mixers import attention
from jaxlab.models import LMConfig
from jaxlab.optimizers import (
    FRUGAL,
    LAMB,
    MKOR,
    SGD,
    SOAP,
    AdAdaGrad,
    AdamW,
    Muon,
    Shampoo,
    WarmupCosine,
    scale_by_shampoo,
    scale_by_soap,
)
from jaxlab.optimizers.mkor import preconditioned
from jaxlab.params import ParamSpec, linear
from jaxlab.training.state import abstract_state

STEPS = 200
SIZE, ROWS = 8, 32
LAYERS = 11  # which sort by their names other than by their numbers
EARLY = WarmupCosine(warmup=2, end=0.01)

OPTIMIZERS = {
    "adadagrad": AdAdaGrad(0.5, EARLY).build,
    "adamw": AdamW(0.1, EARLY, weight_decay=1e-3).build,
    "sgd": SGD(0.1, EARLY, clip=10.0).build,
    "frugal": FRUGAL(0.1, EARLY, weight_decay=1e-3, density=0.5, period=10).build,
    "lamb": LAMB(0.1, EARLY, weight_decay=1e-3).build,
    "muon": Muon(0.1, EARLY, weight_decay=1e-3).build,
    "shampoo": Shampoo(
        0.1, EARLY, weight_decay=1e-3, ridge=1e-4, period=2, largest=SIZE
    ).build,
    "soap": SOAP(0.1, EARLY, weight_decay=1e-3, period=2, largest=SIZE).build,
    "mkor": MKOR(base=SGD(0.1, EARLY, clip=10.0)).build,
}

LAYER = {
    "w": ParamSpec((SIZE, SIZE), ("width", "hidden")),
    "b": ParamSpec((SIZE,), ("hidden",), initializers.normal(1.0), "bias"),
}


def specs_of(dtype=jnp.float32):
    specs = {
        "layers": params.stack(LAYER, LAYERS),
        "scale": ParamSpec((SIZE,), ("width",), initializers.ones, "scale"),
        "tall": ParamSpec((2 * SIZE, SIZE), ("width", "hidden")),
    }
    return jax.tree.map(lambda spec: dataclasses.replace(spec, dtype=dtype), specs)


def loss(weights, seed):
    """The mean square of x w + b + z tall - y, for random x, y, z, over all layers."""
    numbers = jax.random.normal(
        jax.random.key(seed), (ROWS, 4 * SIZE), weights["scale"].dtype
    )
    x, y, z = jnp.split(numbers, [SIZE, 2 * SIZE], axis=1)
    x *= weights["scale"][None]
    y -= linear(z, weights["tall"])

    def one(total, layer):
        error = linear(x, layer["w"]) + layer["b"][None] - y
        return total + jnp.mean(error**2), None

    return jax.lax.scan(one, jnp.zeros((), x.dtype), weights["layers"])[0]


def with_taps(loss, specs, weights, *args):
    """The gradient of a loss, and the taps of its products, which MKOR needs."""
    tapped = params.tap(weights, preconditioned(specs))
    return params.untap(jax.grad(loss)(tapped, *args))


@functools.cache
def compiled_gradient():
    """Of the loss, with its taps, at weights and a seed; one for all optimizers."""
    return jax.jit(functools.partial(with_taps, loss, specs_of()))


@functools.cache
def initial_weights():
    return jax.jit(lambda key: params.init(specs_of(), key))(jax.random.key(1))


def updates_of(optimizer, g, state, weights, **extra):
    with jax.numpy_dtype_promotion("standard"):  # as the training step does
        return optimizer.update(g, state, weights, **extra)


class Law:
    """One optimizer and its compiled functions, made once for all tests."""

    def __init__(self, name):
        self.name, self.build = name, OPTIMIZERS[name]
        self.specs = specs_of()
        self.optimizer = self.build(self.specs, STEPS)
        self.weights = initial_weights()
        self.step = jax.jit(self._step)
        self.update = jax.jit(functools.partial(updates_of, self.optimizer))

    def _step(self, weights, state, seed):
        g, stats = with_taps(loss, self.specs, weights, seed)
        u, state = updates_of(self.optimizer, g, state, weights, stats=stats)
        return optax.apply_updates(weights, u), state

    def run(self, steps=4):
        weights, state = self.weights, self.optimizer.init(self.weights)
        for seed in range(steps):
            weights, state = self.step(weights, state, seed)
        return weights, state


@pytest.fixture(params=OPTIMIZERS, scope="module")
def law(request):
    return Law(request.param)


def close(actual, expected):
    """Within a thousandth of each array's largest entry."""

    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max())

    jax.tree.map(compare, actual, expected)


def kinds(tree):
    """All that a compiled function is compiled for."""
    abstract = jax.eval_shape(lambda tree: tree, tree)
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), abstract)


def is_left_out(leaf):
    return isinstance(leaf, optax.MaskedNode)


def test_the_second_step_is_compiled_already(law):
    law.run()
    assert law.step._cache_size() == 1


def test_unknown_arguments_are_ignored(law):
    g, stats = jax.eval_shape(lambda w: with_taps(loss, law.specs, w, 0), law.weights)
    state = jax.eval_shape(law.optimizer.init, law.weights)
    update = functools.partial(updates_of, law.optimizer, unknown="to all")
    jax.eval_shape(update, g, state, law.weights, stats=stats, value=jnp.ones(()))


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_updates_have_the_dtype_of_the_parameters(law, dtype):
    """And a state keeps its structure, shapes, dtypes and weak types."""
    specs = specs_of(dtype=dtype)
    weights = params.abstract(specs)
    optimizer = law.build(specs, STEPS)
    state = jax.eval_shape(optimizer.init, weights)
    g, stats = jax.eval_shape(lambda w: with_taps(loss, specs, w, 0), weights)
    update = functools.partial(updates_of, optimizer)
    u, after = jax.eval_shape(update, g, state, weights, stats=stats)
    assert kinds(u) == kinds(weights)
    assert kinds(after) == kinds(state)


def test_a_state_is_made_under_jit_and_without_memory(law):
    state = law.optimizer.init(law.weights)
    abstract = jax.eval_shape(law.optimizer.init, params.abstract(law.specs))
    assert kinds(abstract) == kinds(state)
    jax.tree.map(
        np.testing.assert_array_equal, jax.jit(law.optimizer.init)(law.weights), state
    )


def test_a_scan_of_steps_is_as_many_steps(law):
    def body(carry, seed):
        return law._step(*carry, seed), None

    first = law.weights, law.optimizer.init(law.weights)
    scanned, _ = jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.arange(4)))(first)
    close(scanned, law.run(4))


def test_a_mesh_changes_neither_the_updates_nor_the_layout(law):
    mesh = params.make_mesh(params.MeshConfig(data=2, fsdp=2, tensor=2))
    by_param = params.shardings(law.specs, mesh)
    whole = jax.NamedSharding(mesh, jax.P())
    with jax.set_mesh(mesh):
        layout = optax.tree_utils.tree_map_params(
            law.optimizer,
            lambda leaf, sharding: leaf if is_left_out(leaf) else sharding,
            jax.eval_shape(law.optimizer.init, law.weights),
            by_param,
            transform_non_params=lambda _: whole,
            is_leaf=is_left_out,
        )
        weights = jax.device_put(law.weights, by_param)
        state = jax.jit(law.optimizer.init, out_shardings=layout)(weights)
        step = jax.jit(law._step)
        before = weights, state
        for seed in range(4):
            weights, state = step(weights, state, seed)
    assert step._cache_size() == 1

    def assert_same_layout(old, new):
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim), new.sharding

    jax.tree.map(assert_same_layout, before, (weights, state))
    close((weights, state), law.run(4))


def test_what_is_shaped_like_parameters_is_found(law):
    """`tree_map_params` calls `init` without parameters."""
    pairs = []
    optax.tree_utils.tree_map_params(
        law.optimizer,
        lambda leaf, spec: None if is_left_out(leaf) else pairs.append((leaf, spec)),
        law.optimizer.init(law.weights),
        law.specs,
        is_leaf=is_left_out,
    )
    assert len(pairs) >= len(jax.tree.leaves(law.specs))
    for leaf, spec in pairs:  # FRUGAL keeps a part of the columns
        assert all(a <= b for a, b in zip(leaf.shape, spec.shape, strict=True))


def test_the_state_of_a_model_is_sharded(law):
    cfg = LMConfig(
        vocab_size=16,
        width=16,
        n_layers=2,
        pattern=(attention.Config(16, n_heads=2),),
    )
    mesh = params.make_mesh(params.MeshConfig(data=2, fsdp=2, tensor=2))
    state = abstract_state(models.spec(cfg), law.build(models.spec(cfg), STEPS), mesh)
    split = [x for x in jax.tree.leaves(state.opt_state) if any(x.sharding.spec)]
    assert len(split) >= len(jax.tree.leaves(state.params)) / 2


# FRUGAL draws columns by the name of a weight.
@pytest.mark.parametrize("law", [n for n in OPTIMIZERS if n != "frugal"], indirect=True)
def test_a_stack_of_layers_is_as_many_layers(law):
    apart = specs_of() | {"layers": [LAYER] * LAYERS}

    def divided(tree):
        layers = [
            jax.tree.map(lambda x, i=i: x[i], tree["layers"]) for i in range(LAYERS)
        ]
        return tree | {"layers": layers}

    of_parts = law.build(apart, STEPS)
    update = jax.jit(functools.partial(updates_of, of_parts))
    weights = jax.device_get(law.weights)
    state, state_apart = law.optimizer.init(weights), of_parts.init(divided(weights))
    for seed in range(4):
        g, stats = jax.device_get(compiled_gradient()(weights, seed))
        u, state = law.update(g, state, weights, stats=stats)
        u_apart, state_apart = update(
            divided(g), state_apart, divided(weights), stats=divided(stats)
        )
    close(divided(jax.device_get(u)), u_apart)


# MultiSteps would give MKOR the taps of the last part: its caller sums them.
@pytest.mark.parametrize("law", [n for n in OPTIMIZERS if n != "mkor"], indirect=True)
def test_a_step_of_parts_is_a_step_of_their_mean(law):
    parts = optax.MultiSteps(law.optimizer, 2)
    update_parts = jax.jit(functools.partial(updates_of, parts))
    state, state_of_parts = law.optimizer.init(law.weights), parts.init(law.weights)
    for seed in range(3):
        seeds = 2 * seed, 2 * seed + 1
        gs, (stats, _) = zip(
            *(jax.device_get(compiled_gradient()(law.weights, seed)) for seed in seeds),
            strict=True,
        )
        mean = jax.tree.map(lambda x, y: (x + y) / np.float32(2), *gs)
        want, state = law.update(mean, state, law.weights, stats=stats)
        u, state_of_parts = update_parts(gs[0], state_of_parts, law.weights)
        assert not any(np.any(x) for x in jax.tree.leaves(jax.device_get(u)))
        u, state_of_parts = update_parts(gs[1], state_of_parts, law.weights)
        close(u, want)


@pytest.mark.parametrize(
    ("scale_by", "settings"),
    (
        (scale_by_shampoo, {"b1": 0.5, "b2": 0.6, "eps": 0.7, "ridge": 0.1}),
        (scale_by_soap, {"b1": 0.5, "b2": 0.6, "eps": 0.7}),
    ),
)
def test_injected_numbers_are_as_those_given(scale_by, settings):
    """Traced numbers, which are not compared with their ranges."""
    specs, weights = specs_of(), initial_weights()
    scale_by = functools.partial(scale_by, largest=SIZE)
    static = ("specs", "period", "largest")
    found = []
    for optimizer in (
        scale_by(specs, **settings),
        optax.inject_hyperparams(scale_by, static)(specs, **settings),
    ):
        state = optimizer.init(weights)
        update = jax.jit(functools.partial(updates_of, optimizer))
        for seed in range(3):
            g, _ = compiled_gradient()(weights, seed)
            u, state = update(g, state, weights)
        found.append(u)
    close(*found)


# What it is for -----------------------------------------------------------------------


MATRIX = {"w": ParamSpec((8, 4), (None, None), initializers.zeros)}
BIAS = {"b": ParamSpec((4,), (None,), initializers.zeros, "bias")}


@pytest.mark.parametrize("specs", (MATRIX, MATRIX | BIAS), ids=("matrix", "mixed"))
def test_a_quadratic_is_solved(law, specs):
    """The loss of a linear regression falls to a thousandth."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (64, 8)), jax.random.normal(keys[1], (8, 4))
    b = jax.random.normal(keys[2], (4,)) if "b" in specs else jnp.zeros(4)
    y = x @ w + b[None]

    def regression(weights):
        error = linear(x, weights["w"]) + weights.get("b", b)[None] - y
        return jnp.mean(error**2)

    optimizer = law.build(specs, STEPS)
    weights = params.init(specs, jax.random.key(1))

    def step(carry, _):
        weights, state = carry
        g, stats = with_taps(regression, specs, weights)
        u, state = updates_of(optimizer, g, state, weights, stats=stats)
        return (optax.apply_updates(weights, u), state), regression(weights)

    first = weights, optimizer.init(weights)
    (weights, _), losses = jax.lax.scan(step, first, length=STEPS)
    assert regression(weights) < 1e-3 * losses[0]


@pytest.mark.parametrize(
    ("scale_by", "rate"), ((scale_by_shampoo, 0.5), (scale_by_soap, 0.1))
)
def test_both_sides_of_a_matrix_are_preconditioned(scale_by, rate):
    """Where curvature is ill-conditioned and rotated, Adam is left far behind.

    Of half |P^1/2 (W - W*) Q^1/2|^2 with eigenvalues from 1 to 1/1000 of P and of Q,
    after 300 steps, by a factor above 1000; Adam at the best of four rates.
    """
    n, m, steps = 24, 16, 300
    specs = {"w": ParamSpec((n, m), (None, None))}
    rng = np.random.default_rng(0)

    def curvature(k):
        basis = np.linalg.qr(rng.standard_normal((k, k)))[0]
        return jnp.float32((basis * np.logspace(0, -3, k)) @ basis.T)

    P, Q = curvature(n), curvature(m)
    solution = jnp.float32(rng.standard_normal((n, m)))

    def quadratic(w):
        return jnp.sum((w - solution) * (P @ (w - solution) @ Q)) / 2

    def share_left(scale_by, rate):
        schedule = optax.cosine_decay_schedule(rate, steps)
        optimizer = optax.chain(scale_by, optax.scale_by_learning_rate(schedule))

        def step(carry, _):
            w, state = carry
            u, state = updates_of(optimizer, {"w": jax.grad(quadratic)(w)}, state, None)
            return (w + u["w"], state), None

        first = jnp.zeros((n, m)), optimizer.init({"w": jnp.zeros((n, m))})
        (w, _), _ = jax.lax.scan(step, first, length=steps)
        return quadratic(w) / quadratic(first[0])

    adam = optax.scale_by_adam(0.9, 0.95)
    best_adam = min(share_left(adam, rate) for rate in (0.05, 0.1, 0.2, 0.5))
    assert best_adam > 1e-5
    assert share_left(scale_by(specs, b1=0.9), rate) < 1e-3 * best_adam
