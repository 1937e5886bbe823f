"""Step times over the width: the harness at small widths, without its peer."""

import numpy as np

from benchmarks.optimizers import step_time


def test_shares_and_powers_of_made_up_times(tmp_path):
    d = np.array(step_time.WIDTHS)[:, None]
    other = 1 + 0.1 * np.arange(3)[None]  # turns on a machine ever more in use
    times = {
        "SGD": 1e-4 * d**2.0 * other,
        "SGD beside K-FAC": 2e-4 * d**2.0 * other,
        "MKOR": (1e-4 * d**2.0 + 1e-5 * d**2.5) * other,
        "K-FAC": (2e-4 * d**2.0 + 1e-5 * d**3.0) * other,
        "K-FAC's inverses": 1e-6 * d**3.0 * other,
        "MKOR's factors": 1e-6 * d**2.0 * other,
    }
    theirs = step_time.theirs(peer=None)  # asked only when it is opened
    entered = {n: x for n, x in (step_time.ours() | theirs).items() if n in times}
    found = step_time.summary(entered, step_time.WIDTHS, times)
    assert found["SGD"]["exponent"] == 2 and "optimizer" not in found["SGD"]
    assert found["MKOR"]["optimizer"]["exponent"] == 2.5
    assert 2 < found["MKOR"]["exponent"] < found["MKOR"]["exponent_of_larger"] < 2.5
    assert found["K-FAC"]["optimizer"]["exponent_of_larger"] == 3
    assert found["K-FAC's inverses"]["beside"] == "MKOR's factors"
    ratios = [each["median"] for each in found["K-FAC's inverses"]["ratio"]]
    assert ratios == list(step_time.WIDTHS)
    picture = tmp_path / "times.png"
    step_time.draw(found, step_time.WIDTHS, picture)
    assert picture.stat().st_size > 10_000


def test_contestants_are_timed_and_learn(monkeypatch):
    monkeypatch.setattr(step_time, "TURN", 0.01)
    monkeypatch.setattr(step_time, "REST", 0.0)
    times, losses = step_time.measure(step_time.ours(), (16,), turns=2)
    assert set(times) == {"SGD", "Adam", "MKOR", "MKOR's factors"}
    for each in times.values():
        assert each.shape == (1, 2) and np.all(each > 0)
    assert set(losses) == {"SGD", "Adam", "MKOR"}
    for at_widths in losses.values():
        for first, last in (list(each.values()) for each in at_widths):
            assert last < first


def test_new_factors_cost_the_square_of_the_width():
    """So that what their updates are for, a product of d^3, is not timed with them."""

    def operations(width):
        step, *arguments = step_time.factors_step(step_time.problem(width))
        return step.lower(*arguments).compile().cost_analysis()["flops"]

    assert operations(512) < 4.2 * operations(256)
