"""What untrained fast weights hold, as `benchmarks/lact_recall.py` measures it."""

import jax
import pytest

from benchmarks.lact_recall import WRITE, recall, retention


@pytest.mark.parametrize(
    ("name", "multiple", "low", "high"),
    [("muon", 4, 0.95, 1.0), ("gradient_descent", 1, 0.0, 0.1)],
)
def test_reading_256_pairs(name, multiple, low, high):
    for seed in range(3):
        right = recall(jax.random.key(seed), 256, *WRITE[name], multiple)
        assert low <= right.mean() <= high


def test_pre_norm_keeps_what_post_norm_forgets():
    """A step has size 1: under post-norm it replaces most of what was."""
    post, pre = (
        retention(jax.random.key(0), f"muon {placement}, r=4")
        for placement in ("post", "pre")
    )
    assert post[-1] == pre[-1] == 1.0  # the newest chunk
    assert post[0] < 0.3 and pre[0] > 0.6  # the oldest
