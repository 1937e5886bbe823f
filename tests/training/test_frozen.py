"""Parameters that a run leaves as they are."""

import functools

import jax
import numpy as np
import pytest

from jaxlab import models, params
from jaxlab.mixers import retnet
from jaxlab.models import LMConfig
from jaxlab.objectives import NextToken
from jaxlab.optimizers import LAMB, MKOR, SOAP, AdamW, Muon, WarmupCosine, build_for
from jaxlab.params import named_leaves
from jaxlab.training import TaskData, TrainConfig, load_run, train
from jaxlab.training.state import create_state
from jaxlab.training.step import make_train_step

MODEL = LMConfig(
    vocab_size=8,
    width=8,
    n_layers=2,
    mlp_hidden=8,
    pattern=(retnet.Config(8, n_heads=2),),
)
SCHEDULE = WarmupCosine(warmup=1)
OPTIMIZERS = {
    "adamw": AdamW(1e-2, SCHEDULE),
    "muon": Muon(1e-2, SCHEDULE),
    "soap": SOAP(1e-2, SCHEDULE),
    "mkor": MKOR(base=LAMB(1e-2, SCHEDULE)),
}
FROZEN = ("embedding", "blocks/.*/w_[qk]", "scale")


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(8, size=(8, 6)).astype(np.int32)
    return {
        "inputs": tokens,
        "targets": np.roll(tokens, -1, 1),
        "segment_ids": np.zeros_like(tokens),
        "weights": np.ones(tokens.shape, np.float32),
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parameters_stay_and_have_no_state(name):
    specs, settings = models.spec(MODEL), OPTIMIZERS[name]
    trainable = params.select(specs, [*((p, False) for p in FROZEN), (".*", True)])
    optimizer = build_for(settings, specs, 10, trainable)
    tapped = None
    if hasattr(settings, "tapped"):
        tapped = jax.tree.map(lambda a, b: a and b, settings.tapped(specs), trainable)
    mesh = params.make_mesh(params.MeshConfig(data=4, tensor=2))
    with jax.set_mesh(mesh):
        state = create_state(specs, optimizer, mesh, seed=0)
        before = jax.device_get(state.params)
        kept = sum(x.size for x in jax.tree.leaves(state.opt_state))
        step = make_train_step(NextToken(MODEL), optimizer, 1, tapped, trainable)
        for n in range(2):
            placed = params.place_rows(batch(), mesh)
            state, metrics = step(state, placed, jax.random.key(n))
        after = jax.device_get(state.params)
    assert np.isfinite(float(metrics["loss"]))
    for (path, old), (_, new), (_, learned) in zip(
        named_leaves(before), named_leaves(after), named_leaves(trainable), strict=True
    ):
        assert np.array_equal(old, new) != learned, path
    whole = jax.eval_shape(settings.build(specs, 10).init, before)
    assert kept < sum(x.size for x in jax.tree.leaves(whole))


def test_a_config_names_them(tmp_path):
    cfg = TrainConfig(
        name="a",
        directory=str(tmp_path),
        data=TaskData(eval_rows=8),
        model=MODEL,
        optimizer=OPTIMIZERS["adamw"],
        batch_size=8,
        steps=2,
        frozen=("blocks/.*",),
    )
    start = jax.jit(functools.partial(models.init, MODEL))(jax.random.key(cfg.seed))
    train(cfg)
    learned = load_run(tmp_path / "a").params
    jax.tree.map(np.testing.assert_array_equal, learned["blocks"], start["blocks"])
    assert not np.array_equal(learned["embedding"], start["embedding"])


def test_a_pattern_that_names_nothing_is_refused(tmp_path):
    cfg = TrainConfig(
        directory=str(tmp_path), data=TaskData(), model=MODEL, frozen=("w_none",)
    )
    with pytest.raises(ValueError, match="'w_none' matches no parameter"):
        train(cfg)
