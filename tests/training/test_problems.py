"""Problems in the one loop: what every one obeys, and what searches do besides.

A new problem is one more row of `problems`.
"""

import dataclasses
import json
import pathlib
import shutil
import string
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import params
from jaxlab.checkpoint import CheckpointError
from jaxlab.checkpoint.position import set_position
from jaxlab.data import CorpusConfig
from jaxlab.environments import CartPole, Pendulum
from jaxlab.evolution import EGGROLL
from jaxlab.evolution.integer import IntegerEGGROLL, integer_model
from jaxlab.mixers import attention, retnet
from jaxlab.models import LMConfig
from jaxlab.optimizers import (
    LAMB,
    MKOR,
    SOAP,
    AdamW,
    BatchGrowth,
    Muon,
    WarmupCosine,
    WarmupStableDecay,
)
from jaxlab.rl import GRPO, Copy
from jaxlab.training import (
    Curve,
    Problem,
    RunConfig,
    SearchConfig,
    TaskData,
    TextData,
    TrainConfig,
    load_run,
    loop,
    train,
)
from jaxlab.training.batches import Numbered, StepBatches
from jaxlab.training.metrics import read_metrics
from jaxlab.training.problems import FineTuning, IntegerTraining, PolicySearch


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
    mixer = attention.Config(16, n_heads=2)
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


def integers(corpus, **data):
    return IntegerTraining(
        data=TextData(corpus, sequence_length=16, **data),
        model=integer_model.Config(width=16),
        es=IntegerEGGROLL(population=64, members_per_sequence=8, table_size=2**14),
    )


def recorded(cfg):
    """The lines of a run's metrics, but for the time."""
    lines = read_metrics(pathlib.Path(cfg.directory) / cfg.name / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def values(cfg, name):
    return [line[name] for line in recorded(cfg) if name in line]


# The laws ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Guesses:
    """Questions of somebody's own, whose answer of one byte is guessed now and then."""

    longest: tuple[str, str] = ("a = ", " ")

    def sample(self, rng):
        return f"{rng.choice(list(string.ascii_letters))} = ", " "


def tuning(trained, method, optimizer, **changes):
    return FineTuning(
        init_from=trained,
        questions=Guesses(),
        method=method,
        optimizer=optimizer,
        questions_a_step=4,
        eval_questions=8,
        **changes,
    )


@dataclasses.dataclass(frozen=True)
class Counter:
    """A problem of somebody's own: a number that grows, or a state that does."""

    changes: str = ""
    sums: tuple[float, ...] | None = None  # what is added; None: 0, 1, 2, ...
    greater: bool = True
    goal: str = "total"

    def open(self, steps, seed, *, resumes=False):
        def step(state, batch, key):
            state = {"x": state["x"] + batch}
            if self.changes == "shape":
                state["x"] = state["x"][None]
            if self.changes == "dtype":
                state["x"] = state["x"].astype(jnp.bfloat16)
            if self.changes == "structure":
                state["y"] = state["x"]
            figure = jnp.log(-state["x"]) if self.changes == "nan" else state["x"]
            return state, {"figure": figure}

        return Problem(
            abstract={"x": jax.ShapeDtypeStruct((), jnp.float32)},
            init=lambda: {"x": jnp.zeros(())},
            batches=Numbered(
                float if self.sums is None else lambda n: float(self.sums[n])
            ),
            step=step,
            score=lambda state: {"total": float(state["x"])},
            headline="a sum",
            watched="figure",
            goal=self.goal,
            greater=self.greater,
            curve=lambda scores: Curve("sum.png", "figure", "total", ("a", "b"), "sum"),
            sample=lambda state: f"It is {float(state['x'])} now.",
            advice="Do not take logarithms.",
        )


CONSTANT = WarmupStableDecay(warmup=0, decay=0.0)
GROUPS = GRPO(group=256)
LIKELIHOOD = {"fitness": "likelihood"}
MEMBERS = EGGROLL(population=16, sigma=0.02)
EMBEDDING = {"frozen": ("embedding",)}
MKOR_LAMB = MKOR(base=LAMB(3e-3, CONSTANT))
GROWING = {"accumulate": 2, "growth": BatchGrowth(eta=0.1, largest=8)}

TUNED = {
    "GRPO, MKOR": (GROUPS, MKOR_LAMB, EMBEDDING | GROWING),
    "GRPO, SOAP": (GROUPS, SOAP(3e-3, CONSTANT), EMBEDDING),
    "GRPO, Muon": (GROUPS, Muon(3e-3, CONSTANT), EMBEDDING),
    "EGGROLL, MKOR": (MEMBERS, MKOR_LAMB, EMBEDDING | LIKELIHOOD),
    "EGGROLL, SOAP": (MEMBERS, SOAP(3e-3, CONSTANT), EMBEDDING | LIKELIHOOD),
    "EGGROLL, Muon": (MEMBERS, Muon(3e-3, CONSTANT), EMBEDDING | LIKELIHOOD),
}
SLOW = ("GRPO, SOAP", "GRPO, Muon", "EGGROLL, SOAP", "EGGROLL, Muon")
PROBLEMS = ("counter", "gradients", "policy", "integers", *TUNED)


def problem(name, directory, corpus, trained) -> RunConfig:
    """A run of five steps of each problem."""
    often = {"log_every": 1, "eval_every": 2, "checkpoint_every": 2, "steps": 5}
    if name == "gradients":
        return TrainConfig(
            name="run",
            directory=directory,
            data=TaskData(eval_rows=8),
            model=LMConfig(8, 8, 1, pattern=(retnet.Config(8, n_heads=2),)),
            optimizer=MKOR_LAMB,
            batch_size=8,
            **often,
        )
    tasks = {
        "counter": Counter,
        "policy": lambda: PolicySearch(width=8, layers=1, es=EGGROLL(16)),
        "integers": lambda: integers(corpus, eval_tokens=2**10),
    }
    make = tasks.get(name) or (
        lambda: tuning(trained, TUNED[name][0], TUNED[name][1], **TUNED[name][2])
    )
    return SearchConfig(name="run", directory=directory, task=make(), **often)


def digests(cfg, step):
    """The digests of every array that the run saved, its optimizer's included."""
    run = pathlib.Path(cfg.directory) / cfg.name
    path = run / "checkpoints" / str(step) / "meta" / "metadata"
    arrays = json.loads(path.read_text())["meta"]["arrays"]
    return {name: array["digest"] for name, array in arrays.items()}


def left_by_a_kill(cfg, directory, monkeypatch):
    """Train, and copy what a kill would leave after three steps, two of them saved.

    The third is computed, and neither read nor saved.
    """
    run = pathlib.Path(cfg.directory, cfg.name)

    def copy(_, step, *rest):
        if step == 3:
            latest = time.monotonic() + 60
            while not (run / "checkpoints" / "2").exists():
                assert time.monotonic() < latest, "step 2 is not saved"
                time.sleep(0.01)
            shutil.copytree(run, directory / cfg.name)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "why_stop", copy)
        end = train(cfg)
    return end, dataclasses.replace(cfg, directory=str(directory))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in PROBLEMS],
)
def test_a_run_killed_and_resumed_is_the_run_that_was_not(
    name, corpus, trained, tmp_path, monkeypatch, capsys
):
    whole = problem(name, str(tmp_path / "whole"), corpus, trained)
    end, killed = left_by_a_kill(whole, tmp_path / "killed", monkeypatch)
    capsys.readouterr()
    assert train(killed, resume=True) == end
    assert "continuing after step 2" in capsys.readouterr().out
    assert digests(killed, 5) == digests(whole, 5)
    lines = recorded(whole), recorded(killed)
    assert lines[0] == lines[1] and len(lines[0]) == 8
    if name in TUNED:
        before, after = (
            load_run(trained).params,
            load_run(tmp_path / "whole/run").params,
        )
        same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), before, after)
        assert same["embedding"] and not all(jax.tree.leaves(same))
    if "MKOR" in name:  # its state reports
        assert values(whole, "train/skipped") == [0] * 5
    if name == "GRPO, MKOR":
        assert values(whole, "train/rows")[-1] > values(whole, "train/rows")[0]


def counting(directory, task=None, **settings):
    return SearchConfig(
        name="count", directory=str(directory), task=task or Counter(), **settings
    )


def test_a_run_that_an_exception_ends_is_resumed_as_if_killed(tmp_path, monkeypatch):
    class Ended(BaseException):
        """Nothing of ours catches it."""

    def end(cfg, step, *rest):
        if step == 3:
            raise Ended

    often = {"eval_every": 2, "checkpoint_every": 2, "steps": 5}
    whole, ended = (counting(tmp_path / name, **often) for name in ("whole", "ended"))
    train(whole)
    with monkeypatch.context() as patch, pytest.raises(Ended):
        patch.setattr(loop, "why_stop", end)
        train(ended)
    assert [line["step"] for line in recorded(ended)] == [1, 2, 2]
    train(ended, resume=True)
    assert digests(ended, 5) == digests(whole, 5)
    assert recorded(ended) == recorded(whole) and len(recorded(whole)) == 8


def test_a_problem_of_your_own_needs_nothing_but_itself(tmp_path, capsys):
    assert train(counting(tmp_path, steps=5)) == {"step": 5, "total": 10.0}
    said = capsys.readouterr().out
    assert "a sum" in said and "It is 10.0 now." in said
    assert (tmp_path / "count/sum.png").exists()
    cfg = counting(tmp_path / "b", eval_every=1, until=6.0)
    assert train(cfg) == {"step": 4, "total": 6.0}
    assert train(cfg, resume=True) == {"step": 4, "total": 6.0}
    with pytest.raises(CheckpointError, match="a run of Counter, which has no obj"):
        load_run(tmp_path / "b/count")


def test_other_settings_are_told(tmp_path, capsys):
    train(counting(tmp_path, steps=2))
    assert "other settings" not in capsys.readouterr().out
    train(counting(tmp_path, steps=3, log_every=2), resume=True)
    said = capsys.readouterr().out
    assert "goes on with other settings: steps: 2 before, 3 now; log_every: 1 b" in said


@pytest.mark.parametrize(("greater", "best"), ((True, "3"), (False, "6")))
def test_the_best_score_is_kept(greater, best, tmp_path):
    """The totals are 0, 1, 3, 1, 0, -2 and then 3 again, steps 1 to 7."""
    task = Counter(sums=(0, 1, 2, -2, -1, -2, 5), greater=greater)
    often = {"eval_every": 1, "checkpoint_every": 1, "keep": 1, "keep_best": 1}
    train(counting(tmp_path, task, steps=7, **often))
    kept = {path.name for path in (tmp_path / "count/checkpoints").iterdir()}
    assert kept == {best, "7"}


def test_a_score_that_a_stop_left_out_is_written_by_the_run_that_goes_on(
    tmp_path, monkeypatch
):
    cfg = counting(tmp_path, steps=5, until=2.0, eval_every=4)
    with monkeypatch.context() as patch:
        stop = lambda cfg, step, *rest: "SIGTERM" if step == 3 else None  # noqa: E731
        patch.setattr(loop, "why_stop", stop)
        assert train(cfg) == {"step": 3}
    assert train(cfg, resume=True) == {"step": 3, "total": 3.0}
    assert values(cfg, "score/total") == [3.0]
    train(cfg, resume=True)
    assert values(cfg, "score/total") == [3.0]


def test_a_goal_is_one_of_the_scores(tmp_path):
    with pytest.raises(ValueError, match="is 'nothing', which is not among its scores"):
        train(counting(tmp_path, Counter(goal="nothing"), steps=1))


def test_positions_that_all_processes_share_serve_any_number_of_them():
    """A search saved by two processes goes on in one; a reader of shares does not."""
    numbered = StepBatches(Numbered(np.atleast_1d, {"corpus": "a"}), 1)
    for _ in range(3):
        next(numbered)
    position = numbered.get_state()
    again = StepBatches(Numbered(np.atleast_1d, {"corpus": "a"}), 1)
    set_position(again, [position, position], step=3)
    assert next(again).batch == 3.0
    other = StepBatches(Numbered(np.atleast_1d, {"corpus": "b"}), 1)
    with pytest.raises(CheckpointError, match="corpus was 'a' and is 'b'"):
        set_position(other, [position], step=3)
    # Runs of the former loop saved no position, and one batch a step.
    set_position(again, None, step=7)
    assert next(again).batch == 7.0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    (
        ("shape", TypeError, r"state\['x'\] as float32\[1\], .* began as float32\[\]"),
        ("dtype", TypeError, r"state\['x'\] as bfloat16\[\], but a state keeps its"),
        ("structure", TypeError, "a state of another structure"),
        ("nan", FloatingPointError, "Step 1 is not finite.* Do not take logarithms"),
    ),
)
def test_states_and_figures_that_cannot_go_on(changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        train(counting(tmp_path, Counter(changes), steps=3))
    assert not list((tmp_path / "count").glob("checkpoints/*"))


# Searches -----------------------------------------------------------------------------


def test_a_search_goes_on_as_it_was_and_with_no_other_task(tmp_path):
    cfg = cartpole(tmp_path, steps=2)
    train(cfg)
    again = dataclasses.replace(cfg, steps=3)
    with pytest.raises(CheckpointError, match="already holds a run, saved at step 2"):
        train(again)
    end = train(again, resume=True)
    assert train(again, resume=True) == end
    assert len(values(again, "score/return")) == 2
    other = dataclasses.replace(again.task, width=8)
    with pytest.raises(CheckpointError, match=r"task.width: 16 in the run, 8 now"):
        train(dataclasses.replace(again, task=other), resume=True)


def test_until_stops_where_the_score_is_reached(tmp_path):
    end = train(cartpole(tmp_path, steps=50, eval_every=1, until=9.0))
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
        assert np.isfinite(train(cfg)["return"])


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
    end = train(cfg)
    assert 0 <= end["right"] <= 1 and 0 <= end["right_held_out"] <= 1
    base, tuned = load_run(trained), load_run(tmp_path / "tuned")
    assert tuned.config.model == base.config.model
    assert tuned.config.data == base.config.data
    same = jax.tree.map(jnp.array_equal, base.params, tuned.params)
    assert all(jax.tree.leaves(same)) is not learns
    assert ("nothing was learned" in caplog.text) is not learns


@pytest.mark.slow
def test_a_step_leaves_the_state_where_it_was_on_a_mesh(trained, tmp_path):
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
        start, batch = problem.init(), next(problem.batches)
        state, _ = problem.step(start, batch, jax.random.key(0))
        shardings = jax.tree.map(lambda x: x.sharding, state)
        assert shardings == jax.tree.map(lambda x: x.sharding, start)
        assert shardings == jax.tree.map(lambda x: x.sharding, problem.abstract)


def test_answers_a_step_are_what_methods_are_compared_by():
    by_evolution = FineTuning(
        method=EGGROLL(population=64), questions_a_step=8, samples=4, temperature=1.0
    )
    by_gradient = FineTuning(method=GRPO(group=8), questions_a_step=256)
    assert by_evolution.answers_a_step == by_gradient.answers_a_step == 2048


def test_the_integer_model_learns_in_a_run(corpus, tmp_path):
    task = integers(corpus, eval_tokens=2**14)
    cfg = cartpole(tmp_path, name="integer", task=task, steps=30, eval_every=15)
    train(cfg)
    first, last = values(cfg, "score/bits_per_byte")
    assert last < first


def test_the_integer_model_and_its_corpus_have_to_fit(corpus, tmp_path):
    task = IntegerTraining(
        data=TextData(corpus), model=integer_model.Config(vocab_size=64, separator=0)
    )
    with pytest.raises(ValueError, match="but the corpus 257 ids, of which 256"):
        train(cartpole(tmp_path, task=task))


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
            lambda: FineTuning(method=EGGROLL(), accumulate=2),
            "accumulate=2 divides the gradients of GRPO",
        ),
        (
            lambda: FineTuning(method=EGGROLL(), growth=BatchGrowth()),
            "which EGGROLL has not",
        ),
        (lambda: FineTuning(growth=BatchGrowth()), "accumulate=1 leaves one"),
        (
            lambda: FineTuning(questions_a_step=4, accumulate=3),
            "questions_a_step=4 does not divide into accumulate=3",
        ),
        (
            lambda: FineTuning(
                method=GRPO(updates=2), accumulate=2, growth=BatchGrowth()
            ),
            "updates=2; set updates=1",
        ),
        (lambda: SearchConfig(seed=-1), "seed=-1 is below 0"),
        (lambda: SearchConfig(seed=2**32), "seed=4294967296 has more than the 32 bits"),
        (lambda: SearchConfig(name=""), "name='' must be the name of a folder"),
        (lambda: SearchConfig(name="../x"), "name='../x' must be the name of a folder"),
        (lambda: SearchConfig(name="a\n"), "must be the name of a folder: not empty"),
        (lambda: SearchConfig(max_minutes=0.0), "max_minutes=0.0 must be above 0"),
        (
            lambda: FineTuning(method=EGGROLL(), samples=2, k=2, temperature=1.0),
            "k=2 is of fitness='pass_at_k'",
        ),
    ),
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
