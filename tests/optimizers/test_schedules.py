"""Schedules start, peak and end where they say."""

import numpy as np
import pytest

from jaxlab.optimizers import Rewarming, WarmupCosine, WarmupStableDecay


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


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (WarmupCosine(warmup=100), "warmup=100 steps do not fit into a run of 100"),
        (WarmupCosine(warmup=5, end=2.0), "end=2.0 is a fraction"),
        (WarmupStableDecay(warmup=50, decay=0.6), "overlap"),
        (Rewarming(warmup=60, cycles=2), "warmup=60 steps do not fit into a run of 50"),
        (Rewarming(cycles=0), "cycles=0"),
    ],
)
def test_errors(schedule, message):
    with pytest.raises(ValueError, match=message):
        schedule.build(1.0, 100)
