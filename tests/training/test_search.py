"""Searches from beginning to end: they climb, stop, go on, and refuse another's run."""

import dataclasses
import pathlib
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import params
from jaxlab.checkpoint import CheckpointError
from jaxlab.data import CorpusConfig
from jaxlab.environments import CartPole, Pendulum
from jaxlab.evolution import EGGROLL
from jaxlab.evolution.integer import IntegerEGGROLL, integer_model
from jaxlab.mixers import delta_product
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.rl import GRPO, Copy
from jaxlab.training import TextData, TrainConfig, load_run, train
from jaxlab.training.metrics import read_metrics
from jaxlab.training.search import (
    FineTuning,
    IntegerTraining,
    PolicySearch,
    SearchConfig,
    search,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(12):
        words = rng.choice(["def ", "self.x = x\n", "1\n"], rng.integers(20, 60))
        (folder / f"{i}.txt").write_text("".join(words))
    return CorpusConfig(directory=str(folder / "corpus"), sources=(str(folder),))


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    mixer = delta_product.Config(16, n_heads=2)
    cfg = TrainConfig(
        name="base",
        directory=str(folder),
        data=TextData(corpus, sequence_length=24, eval_tokens=64),
        model=LMConfig(width=16, n_layers=1, pattern=(mixer,)),
        optimizer=AdamW(schedule=WarmupCosine(warmup=1)),
        batch_size=8,
        steps=2,
    )
    train(cfg)
    return str(folder / "base")


def cartpole(directory, **changed):
    task = PolicySearch(width=16, layers=1, es=EGGROLL(population=64), eval_episodes=8)
    return SearchConfig(
        **{"name": "cartpole", "directory": str(directory), "task": task, "steps": 6}
        | {"eval_every": 3, "checkpoint_every": 2}
        | changed
    )


def recorded(cfg, name):
    lines = read_metrics(pathlib.Path(cfg.directory) / cfg.name / "metrics.jsonl")
    return [line[name] for line in lines if name in line]


def test_a_search_resumed_is_the_search_that_was_not_stopped(tmp_path):
    whole = cartpole(tmp_path / "whole", steps=6)
    end = search(whole)
    stopped = cartpole(tmp_path / "stopped", steps=4)
    search(stopped)
    again = dataclasses.replace(stopped, steps=6)
    with pytest.raises(CheckpointError, match="already holds a run, saved at step 4"):
        search(again)
    assert search(again, resume=True) == end
    assert (
        search(again, resume=True) == end and len(recorded(again, "score/return")) == 3
    )
    fitness = recorded(whole, "train/fitness")
    assert len(fitness) == 6 and recorded(again, "train/fitness") == fitness
    other = dataclasses.replace(again.task, width=8)
    with pytest.raises(CheckpointError, match=r"task.width: 16 in the run, 8 now"):
        search(dataclasses.replace(again, task=other), resume=True)


def test_until_stops_where_the_score_is_reached(tmp_path):
    end = search(cartpole(tmp_path, steps=50, eval_every=1, until=9.0))
    assert end["return"] >= 9 and end["step"] < 50
    with pytest.raises(CheckpointError, match="PolicySearch, which has no objective"):
        load_run(tmp_path / "cartpole")


@pytest.mark.slow
def test_every_environment_and_way_to_act_runs(tmp_path):
    for name, task in {
        "box": PolicySearch(Pendulum(max_steps=9), 8, 1, es=EGGROLL(16), episodes=2),
        "drawn": PolicySearch(CartPole(), 8, 1, "sample", es=EGGROLL(16)),
    }.items():
        cfg = cartpole(tmp_path, name=name, task=task, steps=2, eval_every=1)
        assert np.isfinite(search(cfg)["return"])


@pytest.mark.parametrize(
    ("method", "how", "learns"),
    (
        (EGGROLL(population=16, sigma=0.02), {"fitness": "likelihood"}, True),
        (
            EGGROLL(population=16, sigma=0.02),
            {"fitness": "pass_at_k", "samples": 3, "k": 2, "temperature": 1.0},
            False,
        ),
        (GRPO(group=4), {}, False),
    ),
    ids=("likelihood", "pass_at_k", "grpo"),
)
def test_a_tuned_model_is_a_run_of_its_own(
    method, how, learns, trained, tmp_path, caplog
):
    """No answer of an untrained model is right, so that rewards are no signal."""
    task = FineTuning(
        init_from=trained,
        questions=Copy(names=tuple(string.ascii_letters)),
        method=method,
        questions_a_step=2,
        eval_questions=8,
        **how,
    )
    cfg = cartpole(tmp_path, name="tuned", task=task, steps=2, eval_every=1)
    end = search(cfg)
    assert 0 <= end["right"] <= 1 and 0 <= end["right_held_out"] <= 1
    base, tuned = load_run(trained), load_run(tmp_path / "tuned")
    assert tuned.config.model == base.config.model
    assert tuned.config.data == base.config.data
    same = jax.tree.map(jnp.array_equal, base.params, tuned.params)
    assert all(jax.tree.leaves(same)) is not learns
    assert ("nothing was learned" in caplog.text) is not learns


@pytest.mark.slow
def test_a_step_leaves_the_state_as_it_lies_on_a_mesh(trained, tmp_path):
    task = FineTuning(
        init_from=trained,
        questions=Copy(names=tuple(string.ascii_letters)),
        method=EGGROLL(population=16, sigma=0.02),
        questions_a_step=2,
        fitness="likelihood",
        eval_questions=8,
    )
    with jax.set_mesh(params.make_mesh(params.MeshConfig(data=4, tensor=2))):
        problem = task.resolved().open(steps=2, seed=0)
        state, _ = problem.step(problem.state, 0)
        lies = jax.tree.map(lambda x: x.sharding, state)
        assert lies == jax.tree.map(lambda x: x.sharding, problem.state)


def test_answers_a_step_are_what_methods_are_compared_by():
    by_evolution = FineTuning(
        method=EGGROLL(population=64), questions_a_step=8, samples=4, temperature=1.0
    )
    by_gradient = FineTuning(method=GRPO(group=8), questions_a_step=256)
    assert by_evolution.answers_a_step == by_gradient.answers_a_step == 2048


def test_the_integer_model_learns_in_a_run(corpus, tmp_path):
    task = IntegerTraining(
        data=TextData(corpus, sequence_length=16, eval_tokens=2**14),
        model=integer_model.Config(width=16),
        es=IntegerEGGROLL(population=64, members_per_sequence=8, table_size=2**14),
    )
    cfg = cartpole(tmp_path, name="integer", task=task, steps=30, eval_every=15)
    search(cfg)
    first, last = recorded(cfg, "score/bits_per_byte")
    assert last < first


def test_the_integer_model_and_its_corpus_have_to_fit(corpus, tmp_path):
    task = IntegerTraining(
        data=TextData(corpus), model=integer_model.Config(vocab_size=64, separator=0)
    )
    with pytest.raises(ValueError, match="but the corpus 257 ids, of which 256"):
        search(cartpole(tmp_path, task=task))


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: SearchConfig(steps=0), "steps=0 must be at least 1"),
        (lambda: PolicySearch(actions="best"), "actions='best' is not one of"),
        (lambda: PolicySearch(episodes=0), "episodes=0 must be at least 1"),
        (lambda: FineTuning(fitness="taste"), "fitness='taste' is not one of"),
        (lambda: FineTuning(samples=2, k=3), "k=3 must be from 1 to samples=2"),
        (
            lambda: FineTuning(method=EGGROLL(), samples=2),
            "at temperature=0 are all the same",
        ),
        (lambda: FineTuning(samples=2), "samples=2 are of EGGROLL"),
        (
            lambda: FineTuning(method=EGGROLL(), samples=2, k=2, temperature=1.0),
            "k=2 is of fitness='pass_at_k'",
        ),
    ),
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
