"""What optimizers say to trees that do not fit each other, each in one sentence."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import params
from jaxlab.optimizers import (
    LAMB,
    MKOR,
    SGD,
    SOAP,
    AdamW,
    BatchGrowth,
    Rewarming,
    Switch,
    WarmupCosine,
    adadagrad,
    build_for,
    costs,
    frugal,
    gradient_variance,
    lamb,
    mkor,
    muon,
    preconditioned,
    scale_by_adagrad,
    scale_by_adagrad_norm,
    scale_by_frugal,
    scale_by_layer_norms,
    scale_by_mkor,
    scale_by_shampoo,
    scale_by_soap,
    shampoo,
    soap,
    tapped_by,
    wanted_batch,
    while_it_pays,
)
from jaxlab.params import Tap, tap

RATE, IN, OUT = 0.1, 5, 4
WEIGHTS = {
    "dense": {"bias": jnp.ones(OUT), "kernel": jnp.ones((IN, OUT))},
    "stack": jnp.ones((2, OUT, OUT)),
}
STATS = {
    "dense": {"bias": None, "kernel": Tap(jnp.ones(IN), jnp.ones(OUT), jnp.ones(()))},
    "stack": Tap(jnp.ones((2, OUT)), jnp.ones((2, OUT)), jnp.ones(2)),
}
SPECS = params.infer(WEIGHTS)
EARLY = WarmupCosine(warmup=1)
DECAYING = {
    "adadagrad": adadagrad(RATE),
    "adadagrad by its norm": adadagrad(RATE, variant="norm"),
    "frugal": frugal(RATE),
    "lamb": lamb(RATE),
    "mkor": mkor(RATE),
    "muon": muon(RATE),
    "shampoo": shampoo(RATE),
    "soap": soap(RATE),
    "AdamW": AdamW(RATE, EARLY).build(SPECS, 10),
    "SGD": SGD(RATE, EARLY).build(SPECS, 10),
    "LAMB": LAMB(RATE, EARLY).build(SPECS, 10),
    "MKOR": MKOR(SGD(RATE, EARLY), switch=Switch()).build(SPECS, 10),
}
OPTIMIZERS = DECAYING | {
    "mkor and adam": mkor(RATE, base=optax.adam),
    "scale_by_adagrad": scale_by_adagrad(),
    "scale_by_adagrad_norm": scale_by_adagrad_norm(),
    "scale_by_frugal": scale_by_frugal(),
    "scale_by_layer_norms": scale_by_layer_norms(),
    "scale_by_mkor": scale_by_mkor(),
    "scale_by_shampoo": scale_by_shampoo(),
    "scale_by_soap": scale_by_soap(),
    "while_it_pays": while_it_pays(optax.adam(RATE)),
}
STATELESS = ("adadagrad by its norm", "scale_by_adagrad_norm", "scale_by_layer_norms")
"""Whose states are the same for all parameters."""

BY_SPECS = ("AdamW", "SGD", "LAMB", "MKOR")
INFERRED = [name for name in OPTIMIZERS if name not in BY_SPECS]

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def changed(path, change, tree=WEIGHTS):
    """The tree with one leaf changed; None takes it out."""
    key, *rest = path.split("/", 1)
    leaf = changed(rest[0], change, tree[key]) if rest else change(tree[key])
    return {k: x for k, x in (tree | {key: leaf}).items() if x is not None}


def initial(name, weights=WEIGHTS):
    with jax.numpy_dtype_promotion("standard"):
        return OPTIMIZERS[name].init(weights)


def update(name, g=WEIGHTS, state=None, weights=WEIGHTS, stats=STATS, value=1.0):
    """The shapes of an update; nothing is compiled."""
    if state is None:
        state = jax.eval_shape(lambda: initial(name))
    tx = optax.with_extra_args_support(OPTIMIZERS[name])

    def shapes(arrays):
        g, state, weights, stats = arrays
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(g, state, weights, stats=stats, value=value)

    return jax.eval_shape(shapes, (g, state, weights, stats))


def said(error, message):
    return pytest.raises(error, match=re.escape(message))


@every_optimizer
def test_trees_that_fit_are_taken(name):
    """Also parts of a batch, states from a file, and a batch of optimizers."""
    u, state = update(name)
    assert jax.tree.map(jnp.shape, u) == jax.tree.map(jnp.shape, WEIGHTS)
    from_a_file = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    assert jax.tree.structure(update(name, state=from_a_file)[1]) == (
        jax.tree.structure(state)
    )
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), WEIGHTS)
    u, _ = update(name, half)  # gradients may be narrower than parameters
    assert {str(x.dtype) for x in jax.tree.leaves(u)} <= {"bfloat16", "float32"}
    several = jax.tree.map(lambda x: jnp.stack([x] * 3), (WEIGHTS, STATS))

    def one(weights, stats):
        state = initial(name, weights)
        tx = optax.with_extra_args_support(OPTIMIZERS[name])
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(weights, state, weights, stats=stats, value=1.0)[0]

    u = jax.eval_shape(jax.vmap(one), *several)
    assert jax.tree.map(jnp.shape, u) == jax.tree.map(jnp.shape, several[0])


@pytest.mark.parametrize("name", INFERRED)
def test_what_is_masked_may_be_anything(name):
    """Here a counter of steps, beside the weights."""
    tx = optax.masked(OPTIMIZERS[name], {"dense": True, "stack": True, "steps": False})
    weights = WEIGHTS | {"steps": jnp.ones((), jnp.int32)}

    def shapes(weights, stats):
        with jax.numpy_dtype_promotion("standard"):
            state = tx.init(weights)
            return tx.update(weights, state, weights, stats=stats, value=1.0)[0]

    u = jax.eval_shape(shapes, weights, STATS | {"steps": None})
    assert jax.tree.map(jnp.shape, u) == jax.tree.map(jnp.shape, weights)


@every_optimizer
@pytest.mark.parametrize("dtype", ("int32", "complex64", "bool"))
@pytest.mark.parametrize("path", ("dense/bias", "stack"))
def test_numbers_that_are_not_floating_point(path, dtype, name):
    other = changed(path, lambda x: x.astype(dtype))
    what = f"The leaf {path!r} of the {{}} is {dtype}["
    with said(TypeError, what.format("updates")):
        update(name, other)
    with said(TypeError, what.format("parameters")):
        update(name, weights=other)
    with said(TypeError, what.format("parameters")):
        initial(name, other)


@every_optimizer
def test_leaves_that_are_no_arrays(name):
    tx = optax.with_extra_args_support(OPTIMIZERS[name])
    word = changed("dense/bias", lambda _: "word")
    message = "The leaf 'dense/bias' of the {} is of type str, but it must be an array"
    with said(TypeError, message.format("parameters")):
        tx.init(word)
    state = initial(name)
    with said(TypeError, message.format("updates")):
        tx.update(word, state, WEIGHTS, stats=STATS, value=1.0)
    none = changed("dense/bias", lambda x: np.zeros(OUT, jax.dtypes.float0))
    with said(TypeError, "The leaf 'dense/bias' of the updates is float0[4]"):
        tx.update(none, state, WEIGHTS, stats=STATS, value=1.0)


@every_optimizer
def test_updates_unlike_the_parameters(name):
    fewer = changed("dense/bias", lambda x: None)
    wider = changed("dense/kernel", lambda x: jnp.ones((IN, OUT + 1)))
    more = WEIGHTS | {"more": jnp.ones(2)}
    where = "parameters given to update"
    for g, message in (
        (fewer, f"'dense/bias' is in the {where}, but not in the updates; give"),
        (more, f"'more' is in the updates, but not in the {where}; give the opt"),
        (wider, "'dense/kernel' has shape (5, 5) in the updates, but (5, 4) in the "),
        (jax.tree.leaves(WEIGHTS), "'0' is in the updates, but not in the "),
        (None, "'dense/bias' is in the "),
    ):
        with said(ValueError, "The leaf " + message):
            update(name, g)


@every_optimizer
def test_updates_in_other_containers(name):
    weights, g = {"0": jnp.ones((IN, OUT))}, [jnp.ones((IN, OUT))]
    stats = [STATS["dense"]["kernel"]]
    state = initial(name, weights) if name in INFERRED else None
    with pytest.raises(ValueError, match="in other containers|'0' is in the updates"):
        update(name, g, state, weights, stats)


@pytest.mark.parametrize("name", [n for n in INFERRED if n not in STATELESS])
def test_a_state_of_other_parameters(name):
    """By the path in the state, which ends with that of the parameter."""
    others = {
        "dense/kernel": jnp.ones((IN + 1, OUT)),
        "dense/bias": None,
        "stack": jnp.ones((2, OUT + 1, OUT)),
    }
    for path, leaf in others.items():
        if path == "dense/bias" and name in ("scale_by_mkor",):
            continue  # which has no state for it
        state = initial(name, changed(path, lambda _, leaf=leaf: leaf))
        with pytest.raises(ValueError, match=f"The leaf '.*{path}.*' .*in the state"):
            update(name, state=state)


@every_optimizer
def test_no_state_at_all(name):
    tx = optax.with_extra_args_support(OPTIMIZERS[name])
    for state in (WEIGHTS, jnp.ones(3)):
        with pytest.raises(ValueError, match="The leaf .* is in the state, but not in"):
            tx.update(WEIGHTS, state, WEIGHTS, stats=STATS, value=1.0)
    if name != "scale_by_layer_norms":  # which has none
        message = "is in the state that init makes for the updates, but not in the sta"
        for state in (None, ()):
            with said(ValueError, message):
                tx.update(WEIGHTS, state, WEIGHTS, stats=STATS, value=1.0)


def test_a_state_in_other_containers():
    """As a file without a template gives it."""
    state = scale_by_soap().init(WEIGHTS)._asdict()
    with said(ValueError, "have the same leaves in other containers, such as a dict"):
        scale_by_soap().update(WEIGHTS, state)


@pytest.mark.parametrize("name", DECAYING)
def test_weight_decay_needs_the_parameters(name):
    with said(
        ValueError,
        "Weight decay takes a share of the parameters, but params is None; call "
        "update(gradient, state, params).",
    ):
        update(name, weights=None)
    if name not in ("mkor", "MKOR"):  # whose factors come first
        with said(ValueError, "but params is None; call init(params)."):
            OPTIMIZERS[name].init(None)


def test_norms_of_layers_need_the_parameters():
    with said(ValueError, "LAMB rescales updates to the norms of the parameters, but"):
        update("scale_by_layer_norms", weights=None)


# Statistics, the loss, flags ----------------------------------------------------------


def test_taps_that_were_not_split_off():
    tapped = tap(WEIGHTS, preconditioned(WEIGHTS))
    message = "'dense/kernel' of the {} has a tap; split it off by jaxlab.params.untap"
    with said(TypeError, message.format("updates")):
        update("mkor", tapped)
    with said(TypeError, message.format("parameters")):
        initial("mkor", tapped)


def with_tap(**parts):
    return changed("stack", lambda tap: tap.replace(**parts), STATS)


@pytest.mark.parametrize(
    ("stats", "error", "message"),
    (
        (with_tap(rows=jnp.ones(3)), ValueError, "rows of shape (3,), but it must be"),
        (with_tap(a=None), ValueError, "a of shape None, but it must be (2, 4)"),
        (with_tap(g=jnp.ones(4)), ValueError, "g of shape (4,), but it must be (2, 4)"),
        (
            with_tap(g=jnp.ones((2, 4), int)),
            TypeError,
            "The leaf 'stack/g' of the stats is int32[2,4], but it must be an array",
        ),
        (STATS | {"stack": None}, ValueError, "stats have no tap for stack"),
        (WEIGHTS, ValueError, "stats have no tap for dense/kernel"),
    ),
)
@pytest.mark.parametrize("name", ("mkor", "MKOR", "scale_by_mkor"))
def test_statistics_that_do_not_fit(name, stats, error, message):
    with said(error, message):
        update(name, stats=stats)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    (
        (None, ValueError, "depends on the loss: call update(..., value=loss)"),
        ("low", TypeError, "value is of type str, but it must be the loss"),
        ([1.0], TypeError, "value is of type list, but it must be the loss"),
        (1j, TypeError, "value is ~complex64[], but it must be the loss"),
        (np.ones(3), ValueError, "value has shape (3,), but the loss is one number"),
    ),
)
@pytest.mark.parametrize("name", ("while_it_pays", "MKOR"))
def test_a_switch_needs_the_loss(name, value, error, message):
    with said(error, message):
        update(name, value=value)


FLAGS = jax.tree.map(lambda _: True, WEIGHTS)


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    (
        ({"dense": True}, ValueError, "'dense' is in the tree {}, but not in the"),
        ({"dense": FLAGS["dense"]}, ValueError, "'stack' is in the parameters, but no"),
        ([True] * 3, ValueError, "'0' is in the tree {}, but not in the parameters"),
        (FLAGS | {"stack": "no"}, TypeError, "'stack' of {} is 'no', but it must be T"),
        (FLAGS | {"stack": 1}, TypeError, "'stack' of {} is 1, but it must be True or"),
    ),
)
def test_flags_that_are_no_tree_of_booleans(flags, error, message):
    mesh = params.make_mesh(params.MeshConfig())
    for call, what in (
        (lambda: build_for(AdamW(RATE, EARLY), SPECS, 10, flags), "trainable"),
        (lambda: tapped_by(MKOR(), SPECS, flags), "trainable"),
        (lambda: costs(soap(RATE), SPECS, mesh, tapped=flags), "tapped"),
    ):
        with said(error, message.format(what)):
            call()


# Settings -----------------------------------------------------------------------------


SETTINGS = (
    (lambda: mkor(RATE, excluded="a/.*"), "excluded='a/.*' must be a sequence of patt"),
    (lambda: mkor(RATE, biases="ab"), "biases='ab' must be a sequence of pairs"),
    (lambda: mkor(RATE, biases=["ab"]), "biases=['ab'] must be a sequence of pairs"),
    (lambda: mkor(RATE, base=3), "base=3 must be a function from the learning rate"),
    (lambda: mkor(RATE, dtype="text"), "dtype='text' must be a type of floating-poin"),
    (lambda: mkor(RATE, dtype=jnp.int8), "must be a type of floating-point numbers"),
    (lambda: MKOR(base=None), "base=None must be the settings of an optimizer; LAMB()"),
    (lambda: SOAP(schedule=None), "schedule=None must be the settings of a schedule;"),
    (lambda: AdamW(schedule="cosine"), "schedule=cosine must be the settings of a sch"),
    (lambda: AdamW(schedule=WarmupCosine), "WarmupCosine'> must be the settings of a"),
    (lambda: frugal(RATE, seed=1.5), "seed=1.5 must be a whole number of at most 32"),
    (lambda: frugal(RATE, seed=2**32), "seed=4294967296 must be a whole number of at"),
    (lambda: frugal(RATE, period=2.0), "period=2.0 must be a whole number of steps"),
    (lambda: EARLY.build(RATE, "all"), "steps=all must be a whole number, at least 1"),
    (lambda: EARLY.build(RATE, 9.5), "steps=9.5 must be a whole number, at least 1"),
    (lambda: Rewarming(1).build(RATE, "all"), "steps=all must be a whole number"),
    (lambda: while_it_pays(optax.identity(), {}), "switch={} must be a Switch: Switch"),
    (lambda: costs(None, SPECS, None, 0), "accumulate=0 must be a whole number, at le"),
    (lambda: BatchGrowth("big"), "eta=big must be between 0 and 1"),
    (lambda: BatchGrowth(largest=2.5), "largest=2.5 must be a whole number of rows"),
    (lambda: BatchGrowth().build("all", 2), "batch_size=all must be a whole number of"),
    (lambda: BatchGrowth().build(4, 2.5), "accumulate=2.5 must be a whole number, at"),
    (lambda: gradient_variance(1.0, 1.0, 2, 0), "batch=0 must be a whole number of r"),
    (lambda: gradient_variance(1.0, 1.0, 2.5, 8), "groups=2.5 must be a whole number"),
    (lambda: wanted_batch(1.0, 1.0, 0.0), "eta=0.0 must be between 0 and 1; it is the"),
    (lambda: wanted_batch(-1.0, 1.0, 0.2), "variance=-1.0 must be finite and at leas"),
)


@pytest.mark.parametrize(("make", "message"), SETTINGS, ids=[x[1] for x in SETTINGS])
def test_settings_that_cannot_be(make, message):
    with said((TypeError, ValueError), message):
        make()
