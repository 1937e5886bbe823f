"""Figures and events are found wherever a state is nested, also under jit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jaxtyping import Array

from jaxlab.optimizers import (
    MKOR,
    AdamW,
    Switch,
    events,
    reported,
    scale_by_mkor,
    while_it_pays,
)
from jaxlab.params import ParamSpec, Tap

SPECS = {
    "w": ParamSpec((3, 2), (None, None)),
    "b": ParamSpec((2,), (None,), role="bias"),
}
GRADIENT = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}


class Counted(NamedTuple):
    steps: Array
    ended: Array

    FIGURES = ("steps",)
    EVENTS = {"ended": "it ends"}


def counting():
    def update(updates, state, params=None):
        return updates, Counted(state.steps + 1, state.ended)

    return optax.GradientTransformation(
        lambda _: Counted(jnp.zeros((), jnp.int32), jnp.full((), -1)), update
    )


NESTED = {
    "alone": counting(),
    "chained": optax.chain(optax.scale(2.0), optax.chain(counting(), optax.trace(0.9))),
    "masked": optax.masked(counting(), {"w": True, "b": False}),
    "partitioned": optax.partition(
        {"one": counting(), "other": optax.sgd(0.1)}, {"w": "one", "b": "other"}
    ),
}


@pytest.mark.parametrize("tx", NESTED.values(), ids=NESTED)
def test_what_is_nested_is_found(tx):
    state = tx.init(GRADIENT)

    @jax.jit
    def step(state):
        _, state = tx.update(GRADIENT, state, GRADIENT)
        return state, reported(state)

    for n in (1, 2):
        state, found = step(state)
        assert {name: int(x) for name, x in found.items()} == {"steps": n, "ended": -1}
    assert events(state) == events(jax.eval_shape(tx.init, GRADIENT))
    assert events(state) == {"ended": "it ends"}


def test_most_states_report_nothing():
    state = AdamW().build(SPECS, 1000).init(GRADIENT)
    assert reported(state) == {} and events(state) == {}


def test_mkor_reports_what_it_skipped():
    """Of two factors, the one whose vector is not finite."""
    tx = while_it_pays(scale_by_mkor(SPECS), Switch(patience=1, warmup=0, least=1e9))
    state = tx.init(GRADIENT)
    a = jnp.full(3, jnp.nan)
    stats = {"w": Tap(a, jnp.ones(2), jnp.ones(())), "b": None}
    _, state = tx.update(GRADIENT, state, stats=stats, value=jnp.float32(1))
    found = {name: int(x) for name, x in reported(state).items()}
    assert found == {"skipped": 1, "left_at": 1}
    assert "leaves its transformation" in events(state)["left_at"]


def test_settings_report_as_what_they_build():
    built = (MKOR(), MKOR(switch=Switch()))
    states = [settings.build(SPECS, 1000).init(GRADIENT) for settings in built]
    assert [set(reported(x)) for x in states] == [{"skipped"}, {"skipped", "left_at"}]


def test_names_are_told_apart():
    tx = optax.chain(counting(), counting())
    with pytest.raises(ValueError, match="Two parts .* report 'steps'"):
        reported(tx.init(GRADIENT))
