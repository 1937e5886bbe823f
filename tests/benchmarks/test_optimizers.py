"""The harness of the optimizers: its curves, and a short run of a method."""

import numpy as np

from benchmarks.optimizers import compare, problems


def test_one_answer_for_all_curves_costs_47_nats():
    """What the README says of the autoencoder's plateau."""
    drawn = np.float64(problems.curves(4000))
    assert drawn.min() >= 0 and drawn.max() <= 1
    p = drawn.mean(0)
    nats = -(p * np.log(p) + (1 - p) * np.log(1 - p)).sum()
    assert abs(nats - 47) < 0.5


def test_a_run_of_mkor():
    opened = problems.autoencoder(batch_size=20)
    found = compare.run(opened, compare.METHODS["MKOR, SGD"], 3e-3, 0, 20)
    assert len(found["losses"]) == 20 and found["losses"][-1] < found["losses"][0]
    assert found["loss"] < found["losses"][0]
