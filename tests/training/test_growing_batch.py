"""Runs whose batch grows: the decisions, what is saved of them, and what they cost."""

import dataclasses
import functools
import json
import math
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import models, params
from jaxlab.checkpoint import CheckpointError
from jaxlab.data.loader import batches
from jaxlab.inference import SamplingParams
from jaxlab.mixers import attention
from jaxlab.models import LMConfig
from jaxlab.objectives import NextToken
from jaxlab.optimizers import (
    LAMB,
    MKOR,
    AdAdaGrad,
    AdamW,
    BatchGrowth,
    WarmupStableDecay,
)
from jaxlab.optimizers.mkor import preconditioned
from jaxlab.training import TextData, TrainConfig, load_run, loop, train
from jaxlab.training.batches import StepBatches
from jaxlab.training.problems import gradient
from jaxlab.training.source import TrainBatches, open_source
from jaxlab.training.state import create_state
from jaxlab.training.step import make_train_step

MODEL = LMConfig(width=16, n_layers=2, pattern=(attention.Config(16, n_heads=4),))
ROWS, PARTS, ETA, LENGTH, STEPS = 8, 4, 0.4, 24, 16
# Its rates do not depend on the number of steps, so that runs share their programs.
CONSTANT = WarmupStableDecay(warmup=2, decay=0.0)
DESCENT = optax.with_extra_args_support(optax.sgd(1.0))


def growing_run(corpus, directory, **changes):
    cfg = TrainConfig(
        name="test",
        directory=str(directory),
        data=TextData(corpus, sequence_length=LENGTH, eval_tokens=200),
        model=MODEL,
        optimizer=AdAdaGrad(learning_rate=0.3, schedule=CONSTANT),
        batch_size=ROWS,
        accumulate=PARTS,
        growth=BatchGrowth(ETA, largest=256),
        steps=STEPS,
        log_every=1,
        eval_every=100,
        checkpoint_every=100,
        sampling=SamplingParams(max_tokens=2),
    )
    return dataclasses.replace(cfg, **changes)


def alone(patch):
    """Runs take one of the devices."""
    make_mesh, one = params.make_mesh, jax.devices()[:1]
    patch.setattr(params, "make_mesh", lambda cfg: make_mesh(cfg, one))


@pytest.fixture
def one_device(monkeypatch):
    alone(monkeypatch)


def lines(cfg):
    """The metrics of every training step, but for the time."""
    path = pathlib.Path(cfg.directory, cfg.name, "metrics.jsonl")
    found = map(json.loads, path.read_text().splitlines())
    return [
        {name: x for name, x in line.items() if name != "time"}
        for line in found
        if "train/loss" in line
    ]


def weights_of(cfg, step=None):
    return jax.device_get(load_run(pathlib.Path(cfg.directory, "test"), step=step)[1])


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """A run that nothing interrupts, all steps of which are saved."""
    directory = tmp_path_factory.mktemp("reference")
    cfg = growing_run(corpus, directory, checkpoint_every=1, keep=STEPS)
    with pytest.MonkeyPatch.context() as patch:
        alone(patch)
        train(cfg)
    return cfg


# The decisions ------------------------------------------------------------------------


@functools.cache
def first_weights(seed):
    init = jax.jit(functools.partial(models.init, MODEL))
    return jax.device_get(init(jax.random.key(seed)))


@jax.jit
@jax.grad
def gradient_of(weights, part):
    logits = models.forward(
        weights, part["inputs"], MODEL, segment_ids=part["segment_ids"]
    )[0]
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, part["targets"][..., None], -1)[..., 0]
    return -jnp.sum(picked * part["weights"])


def asked_for(weights, taken):
    """The norm test in float64, from the gradient of each part of each batch taken."""
    parts = [
        {name: x[i::PARTS] for name, x in batch.items()}
        for batch in taken
        for i in range(PARTS)
    ]
    flat = [
        np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(g)])
        for g in (gradient_of(weights, part) for part in parts)
    ]
    J, W = len(parts), sum(float(part["weights"].sum()) for part in parts)
    g = J * np.array(flat) / W
    mean = g.mean(axis=0)
    b = ROWS * len(taken)
    V = b / J / (J - 1) * np.sum((g - mean) ** 2)
    return V / (ETA**2 * (mean @ mean)), np.sum(g**2), mean @ mean


def test_decisions_are_those_of_float64(reference, one_device):
    """The gradients are at each step's parameters, of the data in its order."""
    source = open_source(reference.data, ROWS, reference.seed)
    wanted, seen = [ROWS, ROWS], 0
    weights = first_weights(reference.seed)
    found = lines(reference)
    for n, line in enumerate(found):
        rows = 2
        while rows < wanted[n]:
            rows *= 2
        assert line["train/rows"] == rows
        seen += rows
        assert line["train/tokens"] == seen * LENGTH
        taken = [next(source.train) for _ in range(rows // ROWS)]
        asked, squares, mean_square = asked_for(weights, taken)
        parts = PARTS * rows // ROWS
        part_norm, norm = line["train/part_gradient_norm"], line["train/gradient_norm"]
        np.testing.assert_allclose(parts * part_norm**2, squares, rtol=1e-4)
        np.testing.assert_allclose(norm**2, mean_square, rtol=1e-4)
        wanted.append(max(wanted[-1], min(math.ceil(asked), 256)))
        np.testing.assert_allclose(line["train/wanted_rows"], wanted[-1], rtol=0.02)
        weights = weights_of(reference, n + 1)
    sizes = [line["train/rows"] for line in found]
    assert sizes[1] == ROWS < sizes[2] < sizes[-1]


@pytest.mark.parametrize("weights_differ", (False, True))
def test_parts_that_weigh_differently_are_the_groups_of_the_mean(weights_differ):
    rng = np.random.default_rng(1)
    draw = lambda: rng.integers(0, 257, (16, 12)).astype(np.int32)  # noqa: E731
    batch = {
        "inputs": draw(),
        "targets": draw(),
        "weights": np.ones((16, 12), np.float32),
        "segment_ids": np.zeros((16, 12), np.int32),
    }
    if weights_differ:
        batch["weights"][::PARTS] = 0.0  # a part without a target
        batch["weights"][1::PARTS, 3:] = 0.0
    metrics = step_metrics(batch)
    taken = [{name: x[m::2] for name, x in batch.items()} for m in range(2)]
    _, squares, mean_square = asked_for(first_weights(seed=0), taken)
    part_norm, norm = metrics["part_gradient_norm"], metrics["gradient_norm"]
    np.testing.assert_allclose(2 * PARTS * part_norm**2, squares, rtol=1e-4)
    np.testing.assert_allclose(norm**2, mean_square, rtol=1e-4)
    # Taps are statistics, and no gradient.
    tapped = step_metrics(batch, tapped=True)
    for name in ("part_gradient_norm", "gradient_norm"):
        np.testing.assert_allclose(tapped[name], metrics[name], rtol=1e-5)


@functools.cache
def step_in_parts(tapped):
    """The mesh of one device, and a step on it in twice as many parts."""
    mesh = params.make_mesh(params.MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        taps = preconditioned(models.spec(MODEL)) if tapped else None
        return mesh, make_train_step(NextToken(MODEL), DESCENT, 2 * PARTS, taps)


def step_metrics(batch, tapped=False):
    mesh, step = step_in_parts(tapped)
    with jax.set_mesh(mesh):
        state = create_state(models.spec(MODEL), DESCENT, mesh, seed=0)
        return step(state, params.place_rows(batch, mesh), jax.random.key(0))[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    (
        params.MeshConfig(data=2, tensor=4),
        params.MeshConfig(data=1, fsdp=2, tensor=4),
    ),
    ids=("data 2 x tensor 4", "fsdp 2 x tensor 4"),
)
def test_a_mesh_decides_as_one_device(corpus, tmp_path, reference, mesh):
    growth = BatchGrowth(ETA, largest=32)  # which the first steps do not pass
    cfg = growing_run(corpus, tmp_path, mesh=mesh, growth=growth, steps=8)
    train(cfg)
    found, want = lines(cfg), lines(reference)[:8]
    for name in ("rows", "tokens", "part_gradient_norm", "gradient_norm", "loss"):
        got, one = ([x[f"train/{name}"] for x in run] for run in (found, want))
        np.testing.assert_allclose(got, one, rtol=1e-3)


# What is saved ------------------------------------------------------------------------


def test_resume_is_bit_identical(corpus, tmp_path, reference, one_device):
    """SIGTERM before the first growth, when the second is decided as well, and before
    the second."""
    cfg, why_stop = growing_run(corpus, tmp_path), loop.why_stop
    sizes = [line["train/rows"] for line in lines(reference)]
    assert sizes[0] == sizes[1] < sizes[2] < sizes[3] == sizes[-1]
    for stop in (2, 3):

        def terminated(cfg, step, *rest, stop=stop):
            if step == stop:  # which is being computed
                signal.raise_signal(signal.SIGTERM)
            return why_stop(cfg, step, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "why_stop", terminated)
            assert train(cfg, resume=True)["step"] == stop
        assert lines(cfg) == lines(reference)[:stop]
    train(cfg, resume=True)
    assert lines(cfg) == lines(reference)
    jax.tree.map(
        np.testing.assert_array_equal, weights_of(cfg), weights_of(reference, STEPS)
    )


def test_a_saved_batch_does_not_shrink(corpus, tmp_path, one_device):
    cfg = growing_run(corpus, tmp_path, steps=4)
    train(cfg)
    for growth, message in (
        (BatchGrowth(ETA, largest=16), r"to \d+ rows, .* above growth.largest=16; a"),
        (None, r"to \d+ rows, which is above the batch size=8; a batch never shrinks"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(dataclasses.replace(cfg, steps=6, growth=growth), resume=True)
    larger = dataclasses.replace(cfg.growth, largest=512)
    train(dataclasses.replace(cfg, steps=5, growth=larger), resume=True)
    assert lines(cfg)[-1]["train/rows"] == 32


def test_a_run_may_begin_to_grow(corpus, tmp_path, one_device):
    growth = BatchGrowth(eta=0.02, largest=32)
    cfg = growing_run(corpus, tmp_path, steps=3, growth=growth)
    train(dataclasses.replace(cfg, growth=None))
    assert "train/wanted_rows" not in lines(cfg)[-1]
    train(dataclasses.replace(cfg, steps=6), resume=True)
    found = lines(cfg)
    sizes = [line["train/rows"] for line in found]
    assert sizes == [8] * 5 + [32]
    seen = list(np.cumsum(sizes) * LENGTH)
    assert [line["train/tokens"] for line in found] == seen


# The batches --------------------------------------------------------------------------


class Numbers:
    """Row n holds n."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return {"inputs": np.full(3, index)}


def grown(wanted, process=0, processes=1):
    """The batches of a process, of which the next two steps want so many rows."""
    controller = BatchGrowth(largest=64).build(8, 4)
    rows = batches(
        Numbers(), batch_size=8, process_index=process, process_count=processes
    )
    found = StepBatches(TrainBatches(rows, {}), 8, 4, controller)
    found.set_state(found.get_state() | {"wanted": wanted})
    return found


@pytest.mark.parametrize("processes", (1, 2))
def test_parts_of_a_grown_step_are_those_of_its_batches(processes):
    """Rows 0 to 7, then 8 to 39, on any number of processes."""
    runs = [grown([8, 32], index, processes) for index in range(processes)]
    for first, times in ((0, 1), (8, 4)):
        steps = [next(run) for run in runs]
        numbers = 4 * times, 8 * times, first + 8 * times
        assert {step[1:4] for step in steps} == {numbers}
        assert [step.grown for step in steps] == [times > 1] * processes
        rows = np.concatenate([step.batch["inputs"][:, 0] for step in steps])
        parts = [set(rows[i :: 4 * times]) for i in range(4 * times)]
        want = [
            {first + 8 * m + i, first + 8 * m + i + 4}
            for m in range(times)
            for i in range(4)
        ]
        assert sorted(parts, key=min) == sorted(want, key=min)


def test_a_test_decides_the_step_after_the_next():
    """V = 8 / 4 / 3 * (6 - 4) = 4 / 3 and eta = 0.2: 34 rows, which is 64."""
    run = grown([8, 8])
    assert next(run).rows == 8
    assert next(run).rows == 8  # before the first one's test is read
    assert run.read(norms(squares=6.0)) == {"wanted_rows": 34}
    assert next(run).rows == 64
    run.read(norms(squares=4.0))
    assert run.read(norms(squares=32.0, parts=32)) == {"wanted_rows": 34}
    assert run.get_state()["wanted"] == [34, 34]


def norms(squares, parts=4):
    """Metrics of a step whose gradient has the norm 1."""
    return {"gradient_norm": 1.0, "part_gradient_norm": math.sqrt(squares / parts)}


def test_programs_are_compiled_once_a_power_of_two(
    corpus, tmp_path, one_device, monkeypatch
):
    made = {}

    def noted(objective, optimizer, parts, *rest):
        assert parts not in made
        made[parts] = make_train_step(objective, optimizer, parts, *rest)
        return made[parts]

    monkeypatch.setattr(gradient, "make_train_step", noted)
    train(growing_run(corpus, tmp_path, steps=4))
    assert list(made) == [4, 8, 16]
    assert [step._cache_size() for step in made.values()] == [1, 1, 1]


def test_statistics_and_evaluations_go_with_it(corpus, tmp_path, one_device, capsys):
    mkor = MKOR(base=LAMB(schedule=CONSTANT))
    cfg = growing_run(corpus, tmp_path, steps=3, eval_every=2, optimizer=mkor)
    train(cfg)
    assert [line["train/rows"] for line in lines(cfg)] == [8, 8, 16]
    said = capsys.readouterr().out
    assert "3 steps of 8 to 256 x 24 tokens" in said
    assert said.count("step 3: the batch is now 16 rows") == 1
    assert "step 2: held-out" in said and "step 3: held-out" in said


# What cannot be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"accumulate": 1}, "accumulate=1 leaves one; set accumulate to 2 or more"),
        ({"batch_size": 12}, "largest=1024 rows are not 1, 2, 4, 8, .* of 3"),
        ({"growth": lambda: BatchGrowth(eta=1.5)}, "eta=1.5 must be between 0 and 1"),
        (
            {"growth": BatchGrowth(largest=4)},
            "batch of 8 rows is above largest=4",
        ),
    ),
)
def test_runs_that_cannot_grow(changes, message):
    fits = {"batch_size": 8, "accumulate": 4, "growth": BatchGrowth()}
    TrainConfig(**fits)
    with pytest.raises(ValueError, match=message):
        made = {name: x() if callable(x) else x for name, x in changes.items()}
        TrainConfig(**fits | made)


def test_a_gradient_that_is_not_finite_ends_the_run_as_ever(
    corpus, tmp_path, one_device
):
    wild = AdamW(learning_rate=1e35, clip=None, schedule=CONSTANT)
    with pytest.raises(FloatingPointError, match="Step . is not finite"):
        train(growing_run(corpus, tmp_path, optimizer=wild, steps=6))


def test_a_run_without_growth_reads_no_test():
    run = StepBatches(TrainBatches(batches(Numbers(), batch_size=8), {}), 8)
    assert next(run).parts == 1 and run.read({}) == {}
