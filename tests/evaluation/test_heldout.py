"""Evaluation against sums made by hand."""

import jax
import numpy as np
import pytest

from jaxlab import models, params
from jaxlab.evaluation import evaluate
from jaxlab.mixers import retnet
from jaxlab.models import LMConfig

CFG = LMConfig(
    vocab_size=8, width=8, n_layers=1, pattern=(retnet.Config(8, n_heads=1),)
)
forward = jax.jit(models.forward, static_argnames="cfg")
init = jax.jit(models.init, static_argnames="cfg")


def batch(seed):
    rng = np.random.default_rng(seed)
    weights = (rng.random((8, 5)) < 0.7).astype(np.float32)
    weights[3:5] = 0  # rows of padding
    ids = np.zeros((8, 5), np.int32)
    ids[3:5] = -1
    return {
        "inputs": rng.integers(0, 8, (8, 5)).astype(np.int32),
        "targets": rng.integers(0, 8, (8, 5)).astype(np.int32),
        "weights": weights,
        "segment_ids": ids,
        "bytes": rng.integers(0, 3, (8, 5)).astype(np.float32),
    }


def test_scores_equal_sums_made_by_hand(key):
    p = init(CFG, key)
    batches = [batch(0), batch(1)]
    mesh = params.make_mesh(params.MeshConfig())
    with jax.set_mesh(mesh):
        scores = evaluate(p, CFG, batches, mesh)

    nats = weight = right = text = 0.0
    rows = rows_right = 0
    for b in batches:
        logits, _ = forward(p, b["inputs"], CFG, segment_ids=b["segment_ids"])
        logits = np.asarray(logits, np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for i, t in np.argwhere(b["weights"] > 0):
            nats -= log_p[i, t, b["targets"][i, t]]
            right += np.argmax(log_p[i, t]) == b["targets"][i, t]
            weight += 1
            text += b["bytes"][i, t]
        for i in range(8):
            counted = b["weights"][i] > 0
            if counted.any():
                rows += 1
                hits = np.argmax(log_p[i], -1) == b["targets"][i]
                rows_right += hits[counted].all()
    assert rows_right > 0 or right > 0
    np.testing.assert_allclose(scores["loss"], nats / weight, rtol=1e-5)
    np.testing.assert_allclose(
        scores["bits_per_byte"], nats / np.log(2) / text, rtol=1e-5
    )
    np.testing.assert_allclose(scores["accuracy"], right / weight)
    np.testing.assert_allclose(scores["row_accuracy"], rows_right / rows)
    assert scores["prefix_accuracy"].shape == (5,)
    assert np.all(np.diff(scores["prefix_accuracy"]) <= 0)


def test_nothing_to_score_is_an_error(key):
    mesh = params.make_mesh(params.MeshConfig())
    empty = batch(0) | {"weights": np.zeros((8, 5), np.float32)}
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="no target"):
        evaluate(init(CFG, key), CFG, [empty], mesh)
    with pytest.raises(ValueError, match="no held-out batches"):
        evaluate({}, CFG, [], mesh)
