"""Targets of weight 0 may be any number, such as another library's mark for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import models, params
from jaxlab.evaluation import evaluate
from jaxlab.mixers import gla
from jaxlab.models import LMConfig
from jaxlab.objectives import NextToken

ROWS, T, VOCABULARY = 8, 6, 8
MODEL = LMConfig(VOCABULARY, 8, 1, (gla.Config(8, n_heads=2, gate_rank=2),))


@pytest.fixture(scope="module")
def weights():
    return jax.jit(models.init, static_argnums=0)(MODEL, jax.random.key(0))


def batch(left_out):
    rng = np.random.default_rng(0)
    made = {
        "inputs": rng.integers(VOCABULARY, size=(ROWS, T)).astype(np.int32),
        "targets": rng.integers(VOCABULARY, size=(ROWS, T)).astype(np.int32),
        "segment_ids": np.zeros((ROWS, T), np.int32),
        "weights": np.tile(np.float32([1, 0, 0.5]), (ROWS, T // 3)),
    }
    made["targets"][made["weights"] == 0] = left_out
    return made


def test_no_loss_or_gradient_knows_them(weights):
    loss = jax.jit(jax.value_and_grad(lambda p, b: NextToken(MODEL).loss(p, b)[0]))
    want = loss(weights, batch(3))
    for left_out in (-100, -1, VOCABULARY, 2**31 - 1):
        got = loss(weights, batch(left_out))
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_no_score_knows_them(weights):
    mesh = params.make_mesh(params.MeshConfig(data=8))
    want, got = (
        evaluate(weights, MODEL, [batch(left_out)], mesh) for left_out in (3, -100)
    )
    assert got["loss"] == want["loss"] and np.isfinite(got["loss"])


def test_others_are_never_the_likelihood_of_another_token():
    nats = models.token_nats(jnp.zeros((4, 5)), jnp.array([-1, 5, 0, -100]))
    np.testing.assert_array_equal(np.isnan(nats), [True, True, False, True])
