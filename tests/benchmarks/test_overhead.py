"""MKOR's overhead: percentages, and a short run of the contestants."""

import jax
import numpy as np
import pytest

from benchmarks.optimizers import overhead
from jaxlab import data, models, params
from jaxlab.mixers import attention
from jaxlab.models import LMConfig
from jaxlab.objectives import NextToken
from jaxlab.optimizers import AdamW
from jaxlab.training import TaskData, TrainConfig
from jaxlab.training.source import open_source
from jaxlab.training.state import create_state
from jaxlab.training.step import make_train_step

TASK = data.AssociativeRecall(length=32, vocab_size=32, num_pairs=4)
CONFIG = TrainConfig(
    data=TaskData(TASK),
    model=LMConfig(
        vocab_size=32, width=16, n_layers=1, pattern=(attention.Config(16, n_heads=2),)
    ),
    batch_size=8,
)


def test_percentages_are_those_of_a_turn():
    entered = overhead.contestants(CONFIG, {"AdamW": AdamW()})
    machine = np.array([1.0, 2.0, 5.0])
    times = {name: machine * (1 + i / 10) for i, name in enumerate(entered)}
    found = overhead.summary(entered, times)
    assert {each["beside"] for each in found.values()} == {"AdamW"}
    percent = [each["percent"]["quartiles"] for each in found.values()]
    assert percent == [[10 * i, 10 * i] for i in range(5)]


@pytest.mark.slow
def test_contestants_make_steps():
    entered = overhead.contestants(CONFIG, {"AdamW": AdamW()})
    times = overhead.measure(CONFIG, entered, turns=1)
    assert set(times) == set(entered) and len(entered) == 5
    for each in times.values():
        assert each.shape == (1,) and each[0] > 0


def test_taps_that_nobody_uses_are_computed():
    """And given ones take their place: the work is in between."""
    entered = overhead.contestants(CONFIG, {"AdamW": AdamW()})
    mesh = params.make_mesh(CONFIG.mesh, jax.devices()[:1])

    def operations(name):
        optimizer, tapped = entered[name].optimizer, entered[name].tapped
        step = make_train_step(NextToken(CONFIG.model), optimizer, 1, tapped)
        state = create_state(models.spec(CONFIG.model), optimizer, mesh, 0)
        return (
            step.lower(state, batch, jax.random.key(0))
            .compile()
            .cost_analysis()["flops"]
        )

    with jax.set_mesh(mesh):
        batch = next(open_source(CONFIG.data, CONFIG.batch_size, 0).train)
        batch = params.place_rows(batch, mesh)
        alone, unused = operations("AdamW"), operations("AdamW with taps unused")
        given, whole = operations("MKOR without taps, AdamW"), operations("MKOR, AdamW")
    assert alone < unused < whole and alone < given < whole
    assert abs(unused - alone + given - whole) < 0.05 * (whole - alone)
