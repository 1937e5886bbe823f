"""Schedules start, peak and end where they say."""

import numpy as np
import pytest

from jaxlab.optimizers import Infinite, Rewarming, WarmupCosine, WarmupStableDecay


def rates(schedule, peak=2.0, steps=100):
    built = schedule.build(peak, steps)
    return np.array([float(built(i)) for i in range(steps + 1)])


def test_warmup_cosine():
    r = rates(WarmupCosine(warmup=10, end=0.1))
    assert r[0] == 0 and r[10] == 2 and np.argmax(r) == 10
    np.testing.assert_allclose(r[55], 0.5 * (2 + 0.2), rtol=1e-6)  # halfway down
    np.testing.assert_allclose(r[100], 0.2, rtol=1e-6)


def test_warmup_stable_decay():
    r = rates(WarmupStableDecay(warmup=10, decay=0.2, end=0.0))
    np.testing.assert_allclose(r[:11], np.linspace(0, 2, 11), rtol=1e-6)
    np.testing.assert_allclose(r[10:81], 2.0)
    np.testing.assert_allclose(r[80:], np.linspace(2, 0, 21), atol=1e-6)


def test_rewarming_returns_to_the_peak():
    r = rates(Rewarming(warmup=10, cycles=2, end=0.1))
    assert r[0] == 0
    np.testing.assert_allclose([r[10], r[50], r[60]], [2.0, 0.2, 2.0], rtol=1e-5)
    np.testing.assert_allclose(r[100], 0.2, rtol=1e-5)


def test_infinite_has_its_four_parts():
    r = rates(Infinite(warmup=10, cooldown=20, constant=0.5, anneal=0.25, end=0.1))
    t = np.arange(101)
    np.testing.assert_allclose(r[:11], 0.2 * t[:11], rtol=1e-6)
    falls = 1 + 0.5 * (1 + np.cos(np.pi * (t[10:31] - 10) / 20))  # from 2 to 1
    np.testing.assert_allclose(r[10:31], falls, rtol=1e-6)
    np.testing.assert_allclose(r[30:76], 1.0, rtol=1e-6)
    np.testing.assert_allclose(r[75:], 0.2 ** ((t[75:] - 75) / 25), rtol=1e-5)


def test_infinite_is_continuous_and_can_be_prolonged():
    schedule = Infinite(warmup=10, cooldown=20, constant=0.5, anneal=0.25, end=0.1)
    short, long = rates(schedule), rates(schedule, steps=400)
    np.testing.assert_array_equal(short[:76], long[:76])
    assert np.abs(np.diff(short)).max() == pytest.approx(0.2)  # of the warmup
    assert np.abs(np.diff(short[10:])).max() < 0.08
    assert long[100] == 1.0 and long[400] == pytest.approx(0.2)
    built = schedule.build(2.0, 100)
    assert float(built(150)) == pytest.approx(0.2)  # past the end
    never = rates(Infinite(warmup=0, cooldown=20, constant=0.5, anneal=0.0, end=0.1))
    assert never[0] == 2.0 and (never[20:] == 1.0).all()


@pytest.mark.parametrize(
    ("of", "change", "message"),
    [
        (
            WarmupCosine,
            {"warmup": 100},
            "warmup=100 steps do not fit into a run of 100",
        ),
        (WarmupCosine, {"warmup": -1}, "warmup=-1 must be a whole number of steps"),
        (WarmupCosine, {"end": 2.0}, r"end=2.0 must be in \[0, 1\]; it is a fraction"),
        (WarmupStableDecay, {"warmup": 50, "decay": 0.6}, "overlap"),
        (WarmupStableDecay, {"decay": float("nan")}, "decay=nan must be in"),
        (Rewarming, {"warmup": 60}, "warmup=60 steps do not fit into a run of 50"),
        (Rewarming, {"cycles": 0}, "cycles=0 must be a whole number, at least 1"),
        (Infinite, {"warmup": 100}, "warmup=100 steps do not fit into a run of 100"),
        (Infinite, {"cooldown": 0}, "cooldown=0 must be a whole number of steps, at"),
        (Infinite, {"warmup": 5, "end": 0.0}, "end=0.0 and constant=0.55 must be"),
        (Infinite, {"warmup": 5, "constant": 0.05}, "an exponential never reaches"),
        (Infinite, {"anneal": -0.1}, "anneal=-0.1 must be in .* a fraction of the run"),
        (
            Infinite,
            {"warmup": 50, "cooldown": 40},
            r"anneal=0.2 of 100 steps \(20\) overlap",
        ),
    ],
)
def test_errors(of, change, message):
    with pytest.raises(ValueError, match=message):
        of(**change).build(1.0, 100)
