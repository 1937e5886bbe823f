"""The harness of the optimizers: its curves, its walk, and short runs."""

import pathlib

import numpy as np
import pytest

from benchmarks.optimizers import compare, problems
from jaxlab import data
from jaxlab.mixers import gla


def test_one_answer_for_all_curves_costs_47_nats():
    """What docs/results/optimizers.md says of the autoencoder's plateau."""
    drawn = np.float64(problems.curves(4000))
    assert drawn.min() >= 0 and drawn.max() <= 1
    p = drawn.mean(0)
    nats = -(p * np.log(p) + (1 - p) * np.log(1 - p)).sum()
    assert abs(nats - 47) < 0.5


@pytest.mark.parametrize("best", [1e-5, 3e-3, 1e-1, 30.0])
def test_the_walk_ends_where_both_neighbours_are_worse(best):
    asked = []

    def loss_of(rate):
        asked.append(rate)
        return np.inf if rate > 3 * best else abs(np.log(rate / best))

    assert compare.walk(loss_of, 1e-2) == best
    at = compare.GRID.index(best)
    assert set(compare.GRID[max(at - 1, 0) : at + 2]) <= set(asked)
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("name", ["Adam", "MKOR-H, LAMB"])
def test_a_run_is_one_program_for_all_rates_and_seeds(name):
    run = compare.Runs(problems.digits(), compare.METHODS[name], 20)
    first, again, other = run(3e-3, 0), run(3e-3, 0), run(3e-3, 1)
    assert first == again and first["losses"] != other["losses"]
    assert run(1e-2, 0)["losses"] != first["losses"]
    assert first["followed"][1] < first["followed"][0]
    assert first["loss"] < first["losses"][0]
    assert first.get("left_at", "none") == (None if "H" in name else "none")


def test_a_language_model_learns_bytes(tmp_path):
    sources = pathlib.Path(problems.__file__).parent.glob("*.py")
    corpus = data.CorpusConfig(
        directory=str(tmp_path), sources=tuple(map(str, sources)), heldout_fraction=0.3
    )
    opened = problems.language_model(gla.Config(64, n_heads=2), 4, corpus)
    found = compare.Runs(opened, compare.METHODS["MKOR, LAMB"], 30)(1e-2, 0)
    assert found["followed"][2] < found["followed"][0] < np.log(264)
    assert abs(found["loss"] - found["losses"][2]) < 0.5


def test_ratios_of_steps_to_a_loss():
    def runs(*curves):
        return {"runs": [{"seed": i, "followed": c} for i, c in enumerate(curves)]}

    data = {
        "every": 10,
        "methods": {
            "LAMB": runs([4, 3, 2, 1.5], [5, 3, 2, 1.4]),
            "Adam": runs([4, 1, 0.5, 0.2], [4, 2, 1.6, 1.6]),
            "SGD": runs([4, 4, 4, 4], [4, 4, 4, 1.5]),
        },
    }
    assert compare.target(data, "LAMB") == 1.5
    assert compare.target(data, "LAMB", 0.5) == 3
    assert compare.target(data, "Adam") == 1.6
    assert compare.steps_to(data, "LAMB", 1.6) == [40, 40]
    assert compare.steps_to(data, "Adam", 1.6) == [20, 30]
    assert compare.steps_to(data, "SGD", 1.6) == [None, 40]
