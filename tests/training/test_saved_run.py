"""A run that was saved by an earlier version goes on in this one.

`saved/run.tar.xz` is one of commit 299883b, whose configs named classes by the paths of
their files.
"""

import dataclasses
import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest

from jaxlab import params
from jaxlab.data import GroupWordProblem
from jaxlab.evolution import EGGROLL
from jaxlab.mixers import gla
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.params import MeshConfig
from jaxlab.training import SearchConfig, TaskData, TrainConfig, load_run, train
from jaxlab.training.metrics import read_metrics
from jaxlab.training.problems import PolicySearch

ARCHIVE = pathlib.Path(__file__).parent / "saved" / "run.tar.xz"


@pytest.fixture
def cfg(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return TrainConfig(
        name="saved_run",
        directory=str(tmp_path),
        data=TaskData(GroupWordProblem("S3", 9), eval_rows=4),
        model=LMConfig(
            vocab_size=8,
            width=8,
            n_layers=1,
            mlp_hidden=8,
            pattern=(gla.Config(8, n_heads=2, gate_rank=2),),
        ),
        optimizer=AdamW(1e-2, WarmupCosine(warmup=1)),
        mesh=MeshConfig(data=4, tensor=2),
        batch_size=4,
        steps=6,
        eval_every=4,
        checkpoint_every=2,
        keep=1,
        keep_best=0,
    )


def test_its_parameters_and_config_are_read(cfg, tmp_path):
    run = load_run(tmp_path / "saved_run")
    assert run.step == 6
    assert run.config.model == cfg.model and run.config.optimizer == cfg.optimizer
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run.params))


def test_it_goes_on(cfg, tmp_path):
    directory = tmp_path / "saved_run"
    (saved,) = directory.glob("checkpoints/6/meta/metadata")
    assert "jaxlab.training.config.TrainConfig" in saved.read_text()
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    (mixer,) = cfg.model.pattern
    other = dataclasses.replace(
        cfg.model, pattern=(dataclasses.replace(mixer, chunk_size=4),)
    )
    longer = dataclasses.replace(cfg, steps=8, model=other)  # the same layer
    scores = train(longer, resume=True)
    assert scores["step"] == 8
    now = (directory / "metrics.jsonl").read_text().splitlines()
    assert now[: len(lines)] == lines
    assert json.loads(now[-1])["step"] == 8


def test_a_search_that_saved_no_position_goes_on_in_the_one_loop(tmp_path, monkeypatch):
    """The same commit had another loop for searches, which counted steps alone."""
    with tarfile.open(ARCHIVE.with_name("search.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    make_mesh, one = params.make_mesh, jax.devices()[:1]
    monkeypatch.setattr(params, "make_mesh", lambda cfg: make_mesh(cfg, one))
    task = PolicySearch(width=4, layers=1, es=EGGROLL(population=8), eval_episodes=2)
    cfg = SearchConfig(
        name="saved_search", directory=str(tmp_path), task=task, steps=6, eval_every=3
    )
    end = train(cfg, resume=True)
    assert end["step"] == 6 and np.isfinite(end["return"])
    lines = read_metrics(tmp_path / "saved_search/metrics.jsonl")
    steps = [line["step"] for line in lines if "train/fitness" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
