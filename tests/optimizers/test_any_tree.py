"""Optimizers outside the house: trees of somebody else, wrappers of optax, 64 bits."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxlab import params
from jaxlab.optimizers import (
    LAMB,
    MKOR,
    SGD,
    AdamW,
    Switch,
    WarmupCosine,
    adadagrad,
    frugal,
    lamb,
    mkor,
    muon,
    scale_by_frugal,
    scale_by_layer_norms,
    scale_by_mkor,
    scale_by_shampoo,
    scale_by_soap,
    shampoo,
    soap,
)
from jaxlab.optimizers.placement import abstract_opt_state
from jaxlab.params import ParamSpec, Tap

RATE, STEPS = 0.1, 3
IN, OUT = 5, 4
SETTINGS = {
    "adadagrad": functools.partial(adadagrad, RATE),
    "frugal": functools.partial(frugal, RATE, density=0.5, period=2),
    "frugal of signs": functools.partial(frugal, RATE, density=0.0),
    "lamb": functools.partial(lamb, RATE),
    "mkor": functools.partial(mkor, RATE, base=optax.adam),
    "muon": functools.partial(muon, RATE),
    "shampoo": functools.partial(shampoo, RATE, period=2, largest=OUT),
    "soap": functools.partial(soap, RATE, period=2, largest=OUT),
}
BUILD = {
    name: build if name == "mkor" else functools.partial(build, weight_decay=0.1)
    for name, build in SETTINGS.items()
}

# Trees with the same leaves in the same order -----------------------------------------

SPECS = {
    "dense": {
        "bias": ParamSpec((OUT,), (None,), role="bias"),
        "kernel": ParamSpec((IN, OUT), (None, "width")),
    },
    "norm": {"scale": ParamSpec((OUT,), (None,), role="scale")},
    "stack": ParamSpec((2, OUT, OUT), ("layers", None, None)),
}


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.RMSNorm(name="norm")(linen.Dense(OUT, name="dense")(x))
        stack = self.param("stack", linen.initializers.ones, (2, OUT, OUT))
        return x @ stack[0] @ stack[1]


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(IN, OUT, rngs=rngs)
        self.norm = nnx.RMSNorm(OUT, rngs=rngs)
        self.stack = nnx.Param(jnp.ones((2, OUT, OUT)))


def register(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(cls))


@register
class Dense:
    bias: Any
    kernel: Any


@register
class Norm:
    scale: Any


@register
class Module:
    dense: Dense
    norm: Norm
    stack: Any


def trees():
    """One tree of shapes of each kind."""
    x = jax.ShapeDtypeStruct((1, IN), jnp.float32)
    zero = jnp.zeros(())
    return {
        "linen": jax.eval_shape(Linen().init, jax.random.key(0), x)["params"],
        "nnx": jax.eval_shape(lambda: nnx.state(NNX(nnx.Rngs(0)))),
        "dataclass": Module(Dense(zero, zero), Norm(zero), zero),
    }


def leaves_of(seed):
    rng = np.random.default_rng(seed)
    shapes = [spec.shape for spec in jax.tree.leaves(SPECS)]
    return [jnp.float32(rng.standard_normal(shape)) for shape in shapes]


def taps_of(seed):
    """A tap a matrix, None for the rest, in the order of the leaves."""
    rng, taps = np.random.default_rng(seed), []
    for spec in jax.tree.leaves(SPECS):
        if spec.role == "matrix":
            *stack, n_in, n_out = spec.shape
            a = jnp.float32(rng.standard_normal((*stack, n_in)))
            g = jnp.float32(rng.standard_normal((*stack, n_out)))
            taps.append(Tap(a, g, jnp.full(stack, 2.0, jnp.float32)))
        else:
            taps.append(None)
    return taps


def update(optimizer, g, state, weights, stats):
    with jax.numpy_dtype_promotion("standard"):  # as optax expects
        return optimizer.update(g, state, weights, stats=stats)


def initial(optimizer, weights):
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.init(weights)


def kinds(tree):
    abstract = jax.eval_shape(lambda tree: tree, tree)
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), abstract)


@pytest.mark.parametrize("name", BUILD)
def test_every_tree_gets_the_same_update(name):
    """To the bit, since it is the same program: specs, dict, linen, nnx, dataclass."""
    structure = jax.tree.structure(SPECS)
    optimizers = {
        "specs": (BUILD[name](specs=SPECS), structure),
        "dict": (BUILD[name](), structure),
    }
    for kind, tree in trees().items():
        if (kind, name) != ("nnx", "frugal"):  # whose columns are drawn by the paths
            optimizers[kind] = (BUILD[name](), jax.tree.structure(tree))

    def program(optimizer, structure):
        def step(weights, gradients, taps):
            w, g, stats = (structure.unflatten(x) for x in (weights, gradients, taps))
            state = initial(optimizer, w)
            u, state = update(optimizer, g, state, w, stats)
            assert jax.tree.structure(u) == structure
            return jax.tree.leaves(u), jax.tree.leaves(state)

        return str(jax.make_jaxpr(step)(leaves_of(0), leaves_of(1), taps_of(1)))

    programs = {kind: program(*optimizer) for kind, optimizer in optimizers.items()}
    for kind, other in programs.items():
        assert other == programs["specs"], kind


OWNED = {
    "dense": {"bias": False, "kernel": True},
    "norm": {"scale": True},
    "stack": False,
}
NORM_LEFT_OUT = {"dense": True, "norm": False, "stack": True}  # a whole subtree


def wrapped(build):
    """The optimizer in each wrapper, and the leaves that are its own there."""
    labels = jax.tree.map(lambda own: "own" if own else "other", OWNED)
    parts = {"own": build(), "other": optax.sgd(RATE)}
    everything = {"dense": True, "norm": True, "stack": True}
    parts_of_a_step = optax.MultiSteps(optax.apply_if_finite(build(), 2), 2)
    return {
        "plain": (build(), everything),
        "masked": (optax.masked(build(), NORM_LEFT_OUT), NORM_LEFT_OUT),
        "masked, by specs": (optax.masked(build(specs=SPECS), OWNED), OWNED),
        "multi_transform": (optax.multi_transform(parts, labels), OWNED),
        "MultiSteps and apply_if_finite": (parts_of_a_step, everything),
    }


def by_settings(of, specs=SPECS):
    return of(RATE, WarmupCosine(warmup=1), clip=None).build(specs, 10)


WRAPPED = {name: BUILD[name] for name in BUILD if name != "frugal of signs"} | {
    of.__name__: functools.partial(by_settings, of) for of in (AdamW, SGD)
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_of_optax_change_no_update(name):
    """Masked leaves pass; the update of each leaf of its own is as without a wrapper.

    The second of two equal parts makes the step.
    """
    structure = jax.tree.structure(SPECS)
    optimizers = wrapped(WRAPPED[name])

    @jax.jit
    def step(states, g, weights, stats):
        results, after = {}, {}
        for kind, (optimizer, _) in optimizers.items():
            before = states[kind]
            results[kind], state = update(optimizer, g, before, weights, stats)
            if kind.startswith("MultiSteps"):
                results[kind], state = update(optimizer, g, state, weights, stats)
            assert kinds(state) == kinds(before), kind
            after[kind] = state
        return results, after

    weights = structure.unflatten(leaves_of(0))
    states = {kind: initial(tx, weights) for kind, (tx, _) in optimizers.items()}
    for seed in range(1, 1 + STEPS):
        g, stats = (structure.unflatten(of(seed)) for of in (leaves_of, taps_of))
        results, states = step(states, g, weights, stats)
        for kind, (_, owned) in optimizers.items():

            def compare(own, update, expected):
                if own:
                    jax.tree.map(close, update, expected)

            jax.tree.map(compare, owned, results[kind], results["plain"])
    assert step._cache_size() == 1


def close(actual, expected):
    """Within a rounding or two of the largest entry: programs are fused otherwise."""
    largest = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-5 * largest)


def test_a_gradient_that_is_not_finite_is_left_out():
    optimizer = optax.apply_if_finite(soap(RATE, largest=OUT), 2)
    weights = jax.tree.unflatten(jax.tree.structure(SPECS), leaves_of(0))
    state = initial(optimizer, weights)
    bad = jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), weights)
    u, after = jax.jit(functools.partial(update, optimizer))(bad, state, weights, None)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(u))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)


def test_a_model_of_nnx_is_trained():
    model = NNX(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lamb(RATE), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    with jax.numpy_dtype_promotion("standard"):
        optimizer.update(model, jax.tree.map(jnp.ones_like, before))
    after = nnx.state(model, nnx.Param)
    moved = jax.tree.map(lambda a, b: bool(jnp.all(a != b)), before, after)
    assert all(jax.tree.leaves(moved))


# Dtypes -------------------------------------------------------------------------------

EARLY = WarmupCosine(warmup=1)
BY_SPECS = {
    "AdamW": AdamW(schedule=EARLY),
    "SGD": SGD(schedule=EARLY),
    "LAMB without a clip": LAMB(schedule=EARLY, clip=None),
    "MKOR with a switch": MKOR(LAMB(schedule=EARLY), "exact", switch=Switch()),
}


@pytest.mark.parametrize("name", (*BUILD, *BY_SPECS))
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("bits", (32, 64))
def test_a_state_never_changes_its_dtypes_or_shapes(name, dtype, bits):
    """And none is wider than 32 bits, and updates are like the parameters."""
    structure = jax.tree.structure(SPECS)

    weights = structure.unflatten([x.astype(dtype) for x in leaves_of(0)])
    stats = structure.unflatten(taps_of(0))
    with jax.enable_x64(bits == 64):
        if name in BUILD:
            optimizer = BUILD[name]()
        else:
            specs = jax.tree.map(lambda s: dataclasses.replace(s, dtype=dtype), SPECS)
            optimizer = BY_SPECS[name].build(specs, 10)

        def step(g, state, weights, stats):
            with jax.numpy_dtype_promotion("standard"):
                extra = {"stats": stats, "value": jnp.float32(1.0)}
                return optimizer.update(g, state, weights, **extra)

        state = jax.eval_shape(functools.partial(initial, optimizer), weights)
        u, after = jax.eval_shape(step, weights, state, weights, stats)
        assert kinds(after) == kinds(state)
        assert kinds(u) == kinds(weights)
        wide = [x for x in jax.tree.leaves(state) if x.dtype.itemsize > 4]
        assert len(wide) <= (name == "muon"), wide  # optax keeps its coefficients


# What surrounds them ------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in BUILD if n != "frugal of signs"])
def test_an_inferred_state_is_mapped_and_placed(name):
    """By `tree_map_params`, which makes a state without parameters; masked too."""
    mesh = params.make_mesh(params.MeshConfig(fsdp=2, data=2, tensor=2))
    for optimizer in (BUILD[name](), optax.masked(BUILD[name](), OWNED)):
        placed = abstract_opt_state(optimizer, SPECS, mesh)
        assert kinds(placed) == kinds(
            jax.eval_shape(optimizer.init, params.abstract(SPECS))
        )


@pytest.mark.parametrize("name", [n for n in BUILD if n != "frugal of signs"])
def test_a_tree_of_another_structure_is_refused(name):
    """In one sentence with the leaf."""
    structure = jax.tree.structure(SPECS)
    weights = structure.unflatten(leaves_of(0))
    stats = structure.unflatten(taps_of(0))
    optimizer = BUILD[name]()
    state = jax.eval_shape(optimizer.init, weights)
    narrow = weights | {"dense": {"kernel": weights["dense"]["kernel"]}}
    longer = weights | {"stack": jnp.ones((3, OUT, OUT))}
    for g, message in (
        (
            narrow,
            "'dense/bias' is in the parameters given to update, but not in the upd",
        ),
        (
            longer,
            r"'stack' has shape \(3, 4, 4\) in the updates, but \(2, 4, 4\) in the",
        ),
        (
            weights | {"more": jnp.ones(2)},
            "'more' is in the updates, but not in the param",
        ),
    ):
        step = functools.partial(update, optimizer)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(step, g, state, weights, stats)
    with pytest.raises(
        ValueError, match="'more' is in the parameters, but not in the spec"
    ):
        jax.eval_shape(BUILD[name](specs=SPECS).init, weights | {"more": jnp.ones(2)})


@pytest.mark.parametrize(
    "scale_by", (scale_by_soap, scale_by_shampoo, scale_by_frugal, scale_by_mkor)
)
def test_updates_are_compared_with_the_state_where_parameters_are_not_given(scale_by):
    weights = jax.tree.unflatten(jax.tree.structure(SPECS), leaves_of(0))
    state = jax.eval_shape(scale_by().init, weights)
    other = weights | {"dense": {"bias": weights["dense"]["bias"]}}
    with pytest.raises(ValueError, match="dense/kernel"):
        jax.eval_shape(scale_by().update, other, state)


def test_layer_norms_need_parameters():
    g = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="params is None; call update"):
        scale_by_layer_norms().update(g, scale_by_layer_norms().init(g))


def test_mkor_says_how_to_get_statistics():
    weights = {"w": jnp.ones((2, 3))}
    optimizer = mkor(RATE)
    with pytest.raises(ValueError, match="MKOR needs statistics: differentiate with"):
        optimizer.update(weights, optimizer.init(weights), weights)


def test_rules_for_roles_reach_an_optimizer():
    """Stacked biases [layers, out] are no matrix once a rule says so."""
    weights = {"b": jnp.ones((3, OUT)), "w": jnp.ones((3, OUT, OUT))}
    specs = params.infer(weights, [("b", "bias")])
    factors = {
        name: set(scale_by_soap(of).init(weights).factors)
        for name, of in (("arrays", None), ("rules", specs), ("params", weights))
    }
    assert factors == {"arrays": {"b", "w"}, "rules": {"w"}, "params": {"b", "w"}}


def test_two_leaves_of_one_path_are_refused():
    weights = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    with pytest.raises(ValueError, match="Two leaves have the path 'a/b'"):
        jax.eval_shape(soap(RATE).update, weights, None, weights)
