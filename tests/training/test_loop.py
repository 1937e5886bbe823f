"""Runs from beginning to end: resume, kill, SIGTERM, damage, and a user's mistakes."""

import contextlib
import dataclasses
import functools
import gc
import io
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import data, models, params
from jaxlab.checkpoint import CheckpointError
from jaxlab.config import from_json, to_json
from jaxlab.data import CorpusConfig, GroupWordProblem
from jaxlab.evaluation import evaluate
from jaxlab.inference import SamplingParams
from jaxlab.mixers import attention, mom, retnet
from jaxlab.models import LMConfig
from jaxlab.objectives import NextToken
from jaxlab.optimizers import AdamW, WarmupCosine, WarmupStableDecay
from jaxlab.training import (
    TaskData,
    TextData,
    TrainConfig,
    load_run,
    train,
)
from jaxlab.training.source import open_source
from jaxlab.training.state import create_state
from jaxlab.training.step import make_train_step

MODEL = LMConfig(
    width=16,
    n_layers=2,
    pattern=(retnet.Config(16, n_heads=2), attention.Config(16, n_heads=2)),
)
STEPS = 12
# Its rates do not depend on the number of steps, so that runs share their programs.
CONSTANT = WarmupStableDecay(warmup=2, decay=0.0)


def small_run(corpus, directory):
    return TrainConfig(
        name="test",
        directory=str(directory),
        data=TextData(corpus, sequence_length=24, eval_tokens=200),
        model=MODEL,
        optimizer=AdamW(schedule=CONSTANT),
        batch_size=8,
        steps=STEPS,
        log_every=1,
        eval_every=6,
        checkpoint_every=4,
        prompt="def",
        sampling=SamplingParams(max_tokens=8),
    )


@pytest.fixture
def cfg(corpus, tmp_path):
    return small_run(corpus, tmp_path)


def metrics_text(cfg):
    path = pathlib.Path(cfg.directory, cfg.name, "metrics.jsonl")
    return path.read_text() if path.exists() else ""


def losses(cfg):
    """(step, loss as written) of every training step."""
    lines = map(json.loads, metrics_text(cfg).splitlines())
    return [(x["step"], x["train/loss"]) for x in lines if "train/loss" in x]


class Reference(NamedTuple):
    """A run that nothing interrupts, in this process.

    Attributes:
        cfg: its config.
        result: what it returned.
        said: what it wrote to the standard output.
    """

    cfg: TrainConfig
    result: dict[str, float]
    said: str

    @property
    def losses(self):
        return losses(self.cfg)

    def copied_to(self, directory) -> TrainConfig:
        """The config of a copy of the run."""
        shutil.copytree(self.cfg.directory, directory, dirs_exist_ok=True)
        return dataclasses.replace(self.cfg, directory=str(directory))


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    cfg = small_run(corpus, tmp_path_factory.mktemp("reference"))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result = train(cfg)
    return Reference(cfg, result, said.getvalue())


CHILD = """
import json, sys, jax
from jaxlab import config
from jaxlab.training import train
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
train(config.from_json(json.loads(sys.argv[1])), resume=True)
"""


def start(cfg):
    """The run in a child process, which resumes if there is something to resume."""
    cache = jax.config.jax_compilation_cache_dir
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(to_json(cfg)), str(cache)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(child):
    out, err = child.communicate()
    assert child.returncode == 0, err
    return out


def wait_for_step(cfg, child, step):
    while child.poll() is None and f'"step": {step},' not in metrics_text(cfg):
        time.sleep(0.005)


def test_uninterrupted_run_writes_everything(reference):
    cfg, result, said = reference
    assert result["step"] == STEPS and result["bits_per_byte"] > 0
    picture = pathlib.Path(cfg.directory, "test", "loss.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [step for step, _ in losses(cfg)] == list(range(1, STEPS + 1))
    assert "unigram" in said and "bigram" in said and "A sample after 'def'" in said
    with pytest.raises(CheckpointError, match="already holds a run, saved at step 12"):
        train(cfg)


@pytest.mark.slow
def test_kill_anywhere_and_resume_is_bit_identical(cfg, reference):
    """Killed at a random moment after each of five steps, then finished here."""
    rng = random.Random(0)
    for step in sorted(rng.sample(range(1, STEPS), 5)):
        child = start(cfg)
        wait_for_step(cfg, child, step)
        time.sleep(rng.random() * 0.2)
        child.kill()
        child.communicate()
    train(cfg, resume=True)
    assert losses(cfg) == reference.losses


def test_sigterm_saves_and_exits_0(cfg, reference):
    child = start(cfg)
    wait_for_step(cfg, child, 2)
    child.send_signal(signal.SIGTERM)
    out = finish(child)
    done = losses(cfg)
    assert 2 <= len(done) < STEPS
    assert f"SIGTERM: saved step {len(done)} of {STEPS}" in out
    train(cfg, resume=True)
    assert losses(cfg) == reference.losses


PROCESS = """
import sys, jax
jax.distributed.initialize(f"localhost:{sys.argv[3]}", 2, int(sys.argv[4]))
"""


def start_process(cfg, port, index):
    """One of two processes of four devices each."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    cache = str(jax.config.jax_compilation_cache_dir) + f"-process-{index}"
    program = [sys.executable, "-c", PROCESS + CHILD, json.dumps(to_json(cfg)), cache]
    return subprocess.Popen(
        [*program, str(port), str(index)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_stop_together_and_resume(cfg):
    """Ctrl-C in one of them, then one is killed.

    The losses are those of one process, up to rounding.
    """
    cfg = dataclasses.replace(cfg, steps=60, eval_every=60, checkpoint_every=20)
    alone = dataclasses.replace(cfg, name="alone")
    train(alone)

    def pair():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        return [start_process(cfg, port, index) for index in range(2)]

    children = pair()
    wait_for_step(cfg, children[0], 2)
    children[1].send_signal(signal.SIGINT)
    said = [finish(child) for child in children]
    done = len(losses(cfg))
    assert 2 <= done < 60 and f"SIGTERM: saved step {done} of 60" in said[0]
    assert "SIGINT: the step under way is finished and saved" in said[1]

    children = pair()
    wait_for_step(cfg, children[0], done + 2)
    children[1].kill()
    killed = time.monotonic()
    _, said = children[0].communicate()
    assert children[0].returncode == 1 and time.monotonic() - killed < 20
    sentence = rf"error: process 1 \({children[1].pid} on .*\) of 2 has shown no sign"
    assert re.search(sentence, said) and "Resume" in said and "Traceback" not in said
    children[1].communicate()

    for child in pair():
        finish(child)
    steps, found = zip(*losses(cfg), strict=True)
    assert steps == tuple(range(1, 61))
    np.testing.assert_allclose(found, [x for _, x in losses(alone)], rtol=1e-3)


# Orbax drops coroutines when a read fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_corrupted_checkpoint_falls_back_and_says_so(
    reference, tmp_path, caplog, capsys
):
    cfg = reference.copied_to(tmp_path)
    checkpoints = pathlib.Path(cfg.directory, "test", "checkpoints")
    files = [f for f in (checkpoints / "12" / "state").rglob("d/*") if f.is_file()]
    assert files
    for path in files:
        os.truncate(path, path.stat().st_size // 2)
    result = train(cfg, resume=True)
    assert result["step"] == STEPS
    assert "continuing after step 8" in capsys.readouterr().out
    assert "corrupt-12" in caplog.text
    assert (checkpoints / "corrupt-12").is_dir() and (checkpoints / "12").is_dir()
    assert losses(cfg) == reference.losses
    gc.collect()  # of them, while they are still ignored


def test_checkpoint_of_another_model_names_the_fields(reference, tmp_path):
    cfg = reference.copied_to(tmp_path)
    other = dataclasses.replace(cfg, model=dataclasses.replace(MODEL, width=32))
    with pytest.raises(CheckpointError, match=r"model\.width"):
        train(other, resume=True)


def test_other_data_under_a_saved_position(reference, tmp_path):
    cfg = reference.copied_to(tmp_path)
    for changes, name in (
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"batch_size": 16}, "batch_size was 8 and is 16"),
        ({"data": dataclasses.replace(cfg.data, sequence_length=12)}, "was 24"),
    ):
        with pytest.raises(CheckpointError, match=name):
            train(dataclasses.replace(cfg, **changes), resume=True)


def test_a_corpus_built_anew_from_other_text_is_noticed(cfg, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(6):
        (text / f"{i}.txt").write_text(f"number {i} " * 9)
    other = CorpusConfig(directory=str(tmp_path / "other"), sources=(str(text),))
    mine = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, corpus=other))
    train(dataclasses.replace(mine, steps=4))
    (text / "0.txt").write_text("changed")
    data.build(other, rebuild=True)
    with pytest.raises(CheckpointError, match="corpus was"):
        train(mine, resume=True)


def test_scores_are_those_of_the_step_they_are_shown_for(cfg):
    """Stopped by the clock between evaluations, and best checkpoints by their own."""
    stopped = train(dataclasses.replace(cfg, max_minutes=1e-9, eval_every=5))
    assert stopped["step"] == 0
    run = load_run(pathlib.Path(cfg.directory, "test"))
    source = open_source(cfg.data, cfg.batch_size, cfg.seed)
    with jax.set_mesh(run.mesh):
        scores = evaluate(run.params, cfg.model, source.heldout(), run.mesh)
    np.testing.assert_allclose(stopped["loss"], scores["loss"], rtol=1e-6)


def test_loss_that_is_not_finite_stops_with_advice(cfg):
    wild = dataclasses.replace(
        cfg,
        optimizer=AdamW(learning_rate=1e35, clip=1e9, schedule=WarmupCosine(warmup=5)),
    )
    with pytest.raises(FloatingPointError) as error:
        train(wild)
    message = str(error.value)
    assert "is not finite" in message and "Try a lower learning_rate" in message
    assert "checkpoint" in message


def test_full_disk_costs_a_save_not_the_run(cfg, monkeypatch, caplog):
    from jaxlab.checkpoint import Checkpoints

    save, failures = Checkpoints.save, []

    def full_at_first(self, step, *rest):
        if not failures:
            failures.append(step)
            raise CheckpointError(f"Step {step} could not be saved: the disk is full.")
        save(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", full_at_first)
    assert train(cfg)["step"] == STEPS
    assert failures == [4] and "the disk is full" in caplog.text


def test_task_run_reports_accuracy(tmp_path, capsys):
    cfg = TrainConfig(
        name="parity",
        directory=str(tmp_path),
        data=TaskData(GroupWordProblem("parity", length=8), eval_rows=16),
        model=dataclasses.replace(MODEL, vocab_size=8),
        optimizer=AdamW(schedule=WarmupCosine(warmup=1)),
        batch_size=8,
        steps=3,
    )
    assert 0 <= train(cfg)["row_accuracy"] <= 1
    assert "accuracy" in capsys.readouterr().out


def batch_of(cfg, rows):
    rng = np.random.default_rng(1)
    draw = lambda: rng.integers(0, 257, (rows, 12)).astype(np.int32)  # noqa: E731
    return {
        "inputs": draw(),
        "targets": draw(),
        "weights": (rng.random((rows, 12)) < 0.6).astype(np.float32),
        "segment_ids": np.zeros((rows, 12), np.int32),
    }


@functools.cache
def one_step(mesh_cfg, accumulate=1):
    """Parameters before and after one plain gradient step of size 1, and the loss."""
    mesh = params.make_mesh(mesh_cfg, jax.devices()[: 8 if mesh_cfg.data != 1 else 1])
    optimizer = optax.with_extra_args_support(optax.sgd(1.0))
    with jax.set_mesh(mesh):
        state = create_state(models.spec(MODEL), optimizer, mesh, seed=0)
        start = jax.device_get(state.params)
        step = make_train_step(NextToken(MODEL), optimizer, accumulate)
        state, metrics = step(
            state, params.place_rows(batch_of(MODEL, 8), mesh), jax.random.key(0)
        )
    return start, *jax.device_get((state.params, metrics["loss"]))


@pytest.mark.parametrize(
    ("mesh_cfg", "accumulate"),
    [
        (params.MeshConfig(data=1), 4),
        (params.MeshConfig(data=2, fsdp=2, tensor=2), 1),
        (params.MeshConfig(data=4, fsdp=1, tensor=2), 2),
        (params.MeshConfig(data=2, fsdp=1, sequence=4), 1),
    ],
)
def test_mesh_and_accumulation_do_not_change_the_step(mesh_cfg, accumulate):
    start, expected, loss = one_step(params.MeshConfig(data=1))
    _, actual, found = one_step(mesh_cfg, accumulate)
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    for a, b, s in zip(*map(jax.tree.leaves, (actual, expected, start)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b - s)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_auxiliary_losses_are_added_and_reported_apart(accumulate):
    """The gradient is that of the mean loss plus each part's auxiliary loss, which
    counts as much as the part weighs; `loss` stays the likelihood's."""
    mixer = mom.Config(
        16, n_heads=2, rule="linear_attention", convolution=0, balance_weight=0.5
    )
    cfg = dataclasses.replace(MODEL, pattern=(mixer,))
    mesh = params.make_mesh(params.MeshConfig(data=1), jax.devices()[:1])
    optimizer = optax.with_extra_args_support(optax.sgd(1.0))
    batch = batch_of(cfg, 8)
    total = batch["weights"].sum()
    # The rows i, i + accumulate, ... are part i.
    parts = [{n: a[i::accumulate] for n, a in batch.items()} for i in range(accumulate)]

    def objective(p, part):
        """What a part adds to the loss, and the two sums in it."""
        logits, loss = models.forward_with_auxiliary_loss(
            p, part["inputs"], cfg, segment_ids=part["segment_ids"]
        )
        log_p = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_p, part["targets"][..., None], -1)[..., 0]
        nats = -jnp.sum(picked * part["weights"]) / total
        auxiliary = loss * part["weights"].sum() / total
        return nats + auxiliary, (nats, auxiliary)

    with jax.set_mesh(mesh):
        state = create_state(models.spec(cfg), optimizer, mesh, seed=0)
        start = jax.device_get(state.params)
        step = make_train_step(NextToken(cfg), optimizer, accumulate)
        state, metrics = step(state, params.place_rows(batch, mesh), jax.random.key(0))
    gradient = jax.jit(jax.grad(objective, has_aux=True))
    grads, (nats, auxiliary) = functools.reduce(
        functools.partial(jax.tree.map, np.add),
        [jax.device_get(gradient(start, part)) for part in parts],
    )
    np.testing.assert_allclose(metrics["loss"], nats, rtol=1e-5)
    np.testing.assert_allclose(metrics["auxiliary_loss"], auxiliary, rtol=1e-5)
    assert auxiliary > 0.9  # about balance_weight * top_k
    for before, after, grad in zip(
        *map(jax.tree.leaves, (start, state.params, grads)), strict=True
    ):
        moved = np.asarray(before - after)
        assert np.linalg.norm(moved - grad) <= 1e-4 * np.linalg.norm(grad) + 1e-7


def test_state_is_sharded_with_its_parameters():
    mesh = params.make_mesh(params.MeshConfig(data=2, fsdp=2, tensor=2))
    optimizer = AdamW(schedule=WarmupCosine(warmup=1)).build(models.spec(MODEL), 10)
    state = create_state(models.spec(MODEL), optimizer, mesh, seed=0)
    wanted = params.shardings(models.spec(MODEL), mesh)
    assert jax.tree.map(lambda a: a.sharding.spec, state.params) == jax.tree.map(
        lambda s: s.spec, wanted
    )
    shapes = [a.sharding.shard_shape(a.shape) for a in jax.tree.leaves(state.params)]
    moments = [
        a.sharding.shard_shape(a.shape)
        for a in jax.tree.leaves(state.opt_state)
        if a.ndim
    ]
    assert sorted(moments) == sorted(shapes * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": dataclasses.replace(MODEL, vocab_size=200)}, "257 token ids .* 200"),
        ({"batch_size": 12}, "batch_size=12 does not divide over 8 devices"),
        ({"mesh": params.MeshConfig(data=3)}, "do not multiply to the 8 devices"),
        ({"optimizer": AdamW(schedule=WarmupCosine(warmup=50))}, "warmup=50"),
    ],
)
def test_parts_that_do_not_fit(cfg, changes, message):
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(cfg, **changes))


def test_what_the_machine_has_not_is_refused_before_it_is_tried(cfg, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 10**6)
    with pytest.raises(ValueError, match="tokens in a process needs 4,800 GB of mem"):
        train(dataclasses.replace(cfg, batch_size=10**10))
    with pytest.raises(ValueError, match="a counter of 32 bits"):
        dataclasses.replace(cfg, steps=10**10)


@pytest.mark.parametrize("field", ["steps", "batch_size", "log_every"])
def test_counts_must_be_positive(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        TrainConfig(**{field: 0})


def test_config_survives_json(cfg):
    assert from_json(json.loads(json.dumps(to_json(cfg)))) == cfg


def test_own_text_does_not_take_the_place_of_the_default_corpus():
    with pytest.raises(
        ValueError, match="own another directory, such as runs/data/mine"
    ):
        TextData(CorpusConfig(directory="runs/data/stdlib", sources=("notes.md",)))


def test_a_corpus_without_heldout_files_is_refused_before_training(cfg, tmp_path):
    (tmp_path / "one.txt").write_text("too short")
    corpus = CorpusConfig(
        directory=str(tmp_path / "corpus"), sources=(str(tmp_path / "one.txt"),)
    )
    alone = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, corpus=corpus))
    with pytest.raises(ValueError, match="holds nothing out"):
        train(alone)
