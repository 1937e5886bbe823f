"""Numbers that settings refuse, everywhere by one rule and with one sentence."""

import dataclasses
import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.optimizers import (
    FRUGAL,
    LAMB,
    MKOR,
    SGD,
    SOAP,
    AdAdaGrad,
    AdamW,
    Infinite,
    Muon,
    Rewarming,
    Shampoo,
    Switch,
    WarmupCosine,
    WarmupStableDecay,
    adadagrad,
    frugal,
    lamb,
    mkor,
    muon,
    scale_by_adagrad,
    scale_by_adagrad_norm,
    scale_by_frugal,
    scale_by_mkor,
    scale_by_shampoo,
    scale_by_soap,
    shampoo,
    soap,
)
from jaxlab.params import ParamSpec

NAN, INFINITE = math.nan, math.inf
NOT_A_RATE = (NAN, INFINITE, -1e-9)
NOT_POSITIVE = (NAN, INFINITE, 0.0, -1e-9)
NOT_A_MEMORY = (NAN, 1.0, -1e-9)
NOT_A_COUNT = (NAN, INFINITE, 0, -1, 2.5)
NOT_A_SHARE = (NAN, 1.1, -0.1)
REFUSED = {
    "learning_rate": NOT_A_RATE,
    "weight_decay": NOT_A_RATE,
    "free_scale": NOT_A_RATE,
    "clip": (NAN, 0.0, -1e-9),  # infinity does not clip
    "eps": NOT_POSITIVE,
    "ridge": NOT_POSITIVE,
    "rms": NOT_POSITIVE,
    "initial": NOT_POSITIVE,
    "b1": NOT_A_MEMORY,
    "b2": NOT_A_MEMORY,
    "momentum": NOT_A_MEMORY,
    "fast": NOT_A_MEMORY,
    "slow": NOT_A_MEMORY,
    "least": (NAN, INFINITE),
    "period": NOT_A_COUNT,
    "largest": NOT_A_COUNT,
    "iterations": NOT_A_COUNT,
    "patience": NOT_A_COUNT,
    "cycles": NOT_A_COUNT,
    "cooldown": NOT_A_COUNT,
    "warmup": (NAN, -1, 2.5),
    "density": NOT_A_SHARE,
    "blend": NOT_A_SHARE,
    "end": NOT_A_SHARE,
    "anneal": NOT_A_SHARE,
    "constant": NOT_A_SHARE,
    "threshold": (NAN, INFINITE, 1.0),
}
OPTIMIZERS = (AdAdaGrad, AdamW, FRUGAL, LAMB, MKOR, Muon, SGD, SOAP, Shampoo)
SCHEDULES = (Infinite, Rewarming, WarmupCosine, WarmupStableDecay)
FUNCTIONS = (adadagrad, frugal, lamb, mkor, muon, shampoo, soap)
SCALES = (
    scale_by_adagrad,
    scale_by_adagrad_norm,
    scale_by_frugal,
    scale_by_mkor,
    scale_by_shampoo,
    scale_by_soap,
)


def numbers(of):
    """The settings of a class or a function whose default is a number."""
    if dataclasses.is_dataclass(of):
        defaults = {field.name: field.default for field in dataclasses.fields(of)}
    else:
        parameters = inspect.signature(of).parameters.values()
        defaults = {x.name: x.default for x in parameters} | {"learning_rate": 0.1}
        if "learning_rate" not in inspect.signature(of).parameters:
            del defaults["learning_rate"]
        if "clip" in defaults:
            defaults["clip"] = 1.0  # None, for off
    kinds = {name: type(default) for name, default in defaults.items()}
    return [n for n, kind in kinds.items() if kind in (int, float) and n != "seed"]


def refused(of, name):
    if name == "decay":  # of a factor, or the part of a run
        return NOT_A_SHARE if of is WarmupStableDecay else (NAN, 0.0, 1.0)
    return REFUSED[name]


@pytest.mark.parametrize("of", (*OPTIMIZERS, *SCHEDULES, Switch, *FUNCTIONS, *SCALES))
def test_a_number_outside_its_range_is_refused(of):
    """Each one that a class or function has, by name and value."""
    names = numbers(of)
    assert names or of is MKOR
    for name in names:
        for value in refused(of, name):
            change = {name: value}
            if of in FUNCTIONS:
                change = {"learning_rate": 0.1, **change}
            with pytest.raises(ValueError, match=f"{name}={value}.* must be .*"):
                of(**change)


@pytest.mark.parametrize("of", (*OPTIMIZERS, *SCHEDULES))
def test_the_ends_of_ranges_are_taken(of):
    ends = {"learning_rate": 0.0, "weight_decay": 0.0, "b1": 0.0, "b2": 0.0}
    ends |= {"clip": None, "momentum": 0.0, "period": 1, "warmup": 0, "density": 1.0}
    names = {field.name for field in dataclasses.fields(of)}
    of(**{name: end for name, end in ends.items() if name in names})


def test_words_are_no_numbers():
    with pytest.raises(ValueError, match="learning_rate=fast must be finite and at"):
        AdamW(learning_rate="fast")  # type: ignore[arg-type]
    assert LAMB(learning_rate=np.float32(0.1)).learning_rate == np.float32(0.1)


@pytest.mark.parametrize("scale_by", SCALES)
def test_traced_numbers_may_be_any(scale_by):
    names = [n for n in numbers(scale_by) if n not in ("period", "largest", "density")]
    weights = {"w": jnp.ones((3, 2))}

    def made(values):
        return scale_by(**dict(zip(names, values, strict=True))).init(weights)

    jax.eval_shape(made, [jnp.float32(-1.0)] * len(names))


def test_a_rate_may_be_a_schedule():
    for function in FUNCTIONS:
        function(optax.constant_schedule(0.1))


@pytest.mark.parametrize("of", (SGD, AdamW))
def test_no_clip_is_one_that_nothing_reaches(of):
    specs = {"b": ParamSpec((3,), (None,), role="bias")}
    weights = {"b": jnp.arange(3.0)}
    updates = []
    for clip in (None, math.inf, 1e9):
        build = functools.partial(of, schedule=WarmupCosine(warmup=0), clip=clip)
        optimizer = build().build(specs, 10)
        with jax.numpy_dtype_promotion("standard"):
            state = optimizer.init(weights)
            updates.append(optimizer.update(weights, state, weights)[0]["b"])
    for other in updates[1:]:
        np.testing.assert_array_equal(updates[0], other)
