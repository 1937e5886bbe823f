"""Scores by position and by depth against sums made by hand."""

import jax
import numpy as np
import pytest

from jaxlab import models, params
from jaxlab.data import NeedleInHaystack, task_batches
from jaxlab.evaluation import loss_by_position, recall_by_depth
from jaxlab.mixers import retnet
from jaxlab.models import LMConfig

CFG = LMConfig(
    vocab_size=16, width=8, n_layers=1, pattern=(retnet.Config(8, n_heads=1),)
)
forward = jax.jit(models.forward, static_argnames="cfg")
T = 12


def batch(seed):
    """Rows of one, two and three documents, with padding and weights of 0."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((8, T), np.int32)
    ids[1:, 5:] = 1
    ids[2:4, 9:] = 2
    ids[4, 10:] = -1  # padding at the end
    ids[5, :2] = -1  # and at the start
    weights = (rng.random((8, T)) < 0.7).astype(np.float32)
    return {
        "inputs": rng.integers(0, 16, (8, T)).astype(np.int32),
        "targets": rng.integers(0, 16, (8, T)).astype(np.int32),
        "weights": np.where(ids < 0, 0, weights).astype(np.float32),
        "segment_ids": ids,
        "bytes": rng.integers(0, 3, (8, T)).astype(np.float32),
    }


def by_hand(weights_of_model, b):
    """(nats, right) of every target, float64."""
    logits, _ = forward(
        weights_of_model, b["inputs"], CFG, segment_ids=b["segment_ids"]
    )
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, b["targets"][..., None], -1)[..., 0]
    return nats, log_p.argmax(-1) == b["targets"]


@pytest.fixture
def model(key):
    mesh = params.make_mesh(params.MeshConfig())
    with jax.set_mesh(mesh):
        yield models.init(CFG, key), mesh


def test_loss_by_position_counts_from_each_document(model):
    weights, mesh = model
    batches = [batch(0), batch(1)]
    edges = [0, 1, 3, 9, 30, 40]
    found = loss_by_position(weights, CFG, batches, mesh, edges=edges)

    sums = np.zeros((4, 5))  # nats, right, targets, bytes by bin
    for b in batches:
        nats, right = by_hand(weights, b)
        for row in range(8):
            position, document = 0, None
            for t in range(T):
                here = b["segment_ids"][row, t]
                position = position + 1 if here == document else 0
                document = here
                if b["weights"][row, t]:
                    i = max(i for i, edge in enumerate(edges) if position >= edge)
                    text = b["bytes"][row, t]
                    sums[:, i] += nats[row, t], right[row, t], 1, text
    assert np.all(sums[2, :4] > 0)
    np.testing.assert_array_equal(found["weight"], sums[2])
    nats, right, targets, text = sums[:, :4]
    np.testing.assert_allclose(found["loss"][:4], nats / targets, rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"][:4], right / targets)
    bits = nats / np.log(2) / text
    np.testing.assert_allclose(found["bits_per_byte"][:4], bits, rtol=1e-5)
    assert np.isnan(found["loss"][4])  # no position from 30 to 39


def test_positions_outside_the_edges_are_left_out(model):
    weights, mesh = model
    whole = loss_by_position(weights, CFG, [batch(0)], mesh, edges=range(T + 1))
    part = loss_by_position(weights, CFG, [batch(0)], mesh, edges=[2, 3, 4])
    assert 0 < part["weight"].sum() < whole["weight"].sum()
    np.testing.assert_allclose(part["loss"], whole["loss"][2:4], rtol=1e-6)


def test_recall_by_depth(model):
    weights, mesh = model
    task = NeedleInHaystack(T, value_length=2, num_filler=8, num_keys=3, num_values=3)
    it = task_batches(task, batch_size=64, seed=0, split="test")
    b = next(it)
    found = recall_by_depth(weights, CFG, [b], mesh, bins=3)

    nats, right = by_hand(weights, b)
    sums = np.zeros((3, 3))
    for row in range(64):
        i = min(int(b["depth"][row] * 3), 2)
        for t in np.flatnonzero(b["weights"][row]):
            sums[:, i] += nats[row, t], right[row, t], 1
    assert np.all(sums[2] > 0) and sums[2].sum() == 128
    np.testing.assert_array_equal(found["weight"], sums[2])
    np.testing.assert_allclose(found["loss"], sums[0] / sums[2], rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], sums[1] / sums[2])
    assert "bits_per_byte" not in found


def test_mistakes_are_sentences(model):
    weights, mesh = model
    with pytest.raises(ValueError, match=r"edges=\[0, 4, 4\]"):
        loss_by_position(weights, CFG, [batch(0)], mesh, edges=[0, 4, 4])
    with pytest.raises(ValueError, match="no held-out batches"):
        loss_by_position(weights, CFG, [], mesh, edges=[0, 4])
    with pytest.raises(ValueError, match="recall by depth also needs depth"):
        recall_by_depth(weights, CFG, [batch(0)], mesh)
