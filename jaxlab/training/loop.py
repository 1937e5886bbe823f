"""The loop of every run: batch -> step -> metrics -> scores -> checkpoint."""

import contextlib
import dataclasses
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlab import config, params
from jaxlab.checkpoint import CheckpointError, Checkpoints
from jaxlab.training import places
from jaxlab.training.config import RunConfig, may_differ
from jaxlab.training.lock import sole_writer
from jaxlab.training.loss_curve import plot_losses
from jaxlab.training.metrics import MetricWriter
from jaxlab.training.peaks import peak_flops
from jaxlab.training.peers import watched_peers
from jaxlab.training.problem import Problem
from jaxlab.training.progress import Progress
from jaxlab.training.restore import saved_config
from jaxlab.training.stopping import SIGNALS, stop_signals, why_stop
from jaxlab.training.telling import tell

log = logging.getLogger(__name__)


def train(cfg: RunConfig, *, resume: bool = False) -> dict[str, float]:
    """Run a config to its end: `TrainConfig`, `SearchConfig`, or one of your own.

    Everything goes to ``<directory>/<name>``: ``checkpoints/``, ``metrics.jsonl``,
    TensorBoard files and a picture. SIGTERM and Ctrl-C save a checkpoint and return.
    The figures after a resume are those of a run that was never stopped, bit for bit on
    the same devices.

    Args:
        cfg: the run.
        resume: continue from the newest complete checkpoint; without one, start.

    Returns:
        ``step``, and the last scores.

    Raises:
        ValueError: parts of the config do not fit each other, the devices or the data.
        CheckpointError: another process is writing there; the directory holds another
            run, another model or other data; or the last checkpoint could not be
            written.
        FloatingPointError: a figure of a step is not finite.
        TypeError: a step changes the shape of the state.
    """
    run = Path(cfg.directory) / cfg.name
    began = saved_config(run) if resume else None
    if cfg.root is None:
        root = str(Path.cwd()) if began is None else began.root
        cfg = dataclasses.replace(cfg, root=root)
    roots = places.roots(run, cfg if began is None else began)
    cfg = places.resolved(cfg, roots)
    mesh = params.make_mesh(cfg.mesh)
    with sole_writer(run):
        return _open_and_run(cfg, places.located(cfg, roots), run, mesh, resume)


def _open_and_run(
    cfg: RunConfig, located: RunConfig, run: Path, mesh: Mesh, resume: bool
) -> dict[str, float]:
    checkpoints = Checkpoints(
        run / "checkpoints",
        config=config.to_json(cfg),
        keep=cfg.keep,
        keep_best=cfg.keep_best,
        may_differ=may_differ(cfg),
    )
    saved = checkpoints.latest_step()
    if saved is not None:
        _check_continues(cfg, checkpoints, run, saved, resume)
    checkpoints.check_writable()
    peak = _peak_flops(mesh)  # measured on a CPU, outside the mesh
    advice = f"Resume {run} to go on from its last checkpoint."
    with jax.set_mesh(mesh), watched_peers(advice):
        problem = located.open(resumes=saved is not None)
        progress = Progress(
            cfg.steps,
            problem.watched,
            flops_per_token=problem.flops_per_token,
            peak_flops=peak,
        )
        with (
            checkpoints,
            MetricWriter(run) as writer,
            contextlib.closing(progress),
            stop_signals() as received,
        ):
            return _run(cfg, problem, run, progress, checkpoints, writer, received)


def _run(
    cfg: RunConfig,
    problem: Problem,
    run: Path,
    progress: Progress,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    received: list[str],
) -> dict[str, float]:
    if checkpoints.latest_step() is None:
        state, step = problem.init(), 0
    else:
        abstract = jax.tree.map(_on_the_mesh, problem.abstract)
        step, state = checkpoints.restore(abstract, problem.batches)
    _keep(problem.keeps, run)
    writer.truncate_after(step)
    first, recorded = step, writer.has(step, f"{problem.split}/")
    start = f", continuing after step {step}" if step else ""
    _say(f"{run}: {problem.headline}{start}")
    warned: set[str] = set()

    def record(step: int, batch: Any, figures: dict[str, Any]) -> None:
        reading = problem.read(step, batch, figures)
        if not all(map(math.isfinite, reading.values.values())):
            progress.close()
            raise FloatingPointError(
                _not_finite(step, reading.values, checkpoints, problem.advice)
            )
        for sentence in reading.messages:
            progress.message(f"step {step}: {sentence}")
        for sentence in reading.warnings:
            if sentence not in warned:
                log.warning("Step %d: %s", step, sentence)
        warned.update(reading.warnings)
        if reading.events:
            writer.write(step, {f"train/{k}": v for k, v in reading.events.items()})
        progress.update(step, reading.values[problem.watched], reading.tokens)
        if step % cfg.log_every == 0 or step == cfg.steps:
            writer.write(step, {f"train/{k}": v for k, v in reading.values.items()})

    def score(step: int, state: Any) -> dict[str, float]:
        scores = problem.score(state)
        if problem.goal not in scores:
            raise ValueError(
                f"The goal of the problem is {problem.goal!r}, which is not among its "
                f"scores, {', '.join(scores) or 'of which there are none'}."
            )
        if step > first or not recorded:
            writer.write(step, {f"{problem.split}/{k}": v for k, v in scores.items()})
            progress.message(f"step {step}: {problem.describe(scores)}")
        return scores

    def rating(scores: dict[str, float], scored_at: int | None) -> dict | None:
        if scored_at != step:
            return None
        goal = scores[problem.goal]
        return scores | {"loss": -goal if problem.greater else goal}

    key = jax.random.key(cfg.seed)
    scores, scored_at, pending, why = {}, None, None, None
    if step and cfg.until is not None:
        scores, scored_at = score(step, state), step
    started = time.monotonic()
    while step < cfg.steps:
        if scored_at == step and _reached(cfg.until, problem, scores):
            why = f"{problem.goal} has reached {cfg.until:g}"
            break
        if why := why_stop(cfg, step, started, received):
            break
        batch = next(problem.batches)
        if step == first:
            progress.waiting("compiling the step")
        state, figures = problem.step(state, batch, jax.random.fold_in(key, step))
        _check_same_shapes(problem.abstract, state)
        if pending is not None:  # the step before, while this one is computed
            record(*pending)
        step += 1
        pending = step, batch, figures
        scores_now = step % cfg.eval_every == 0 or step == cfg.steps
        saves_now = step % cfg.checkpoint_every == 0 and step < cfg.steps
        if scores_now or saves_now:  # nothing that is not finite is scored or saved
            record(*pending)
            pending = None
        if scores_now:
            scores, scored_at = score(step, state), step
        if saves_now:
            _save_or_warn(
                checkpoints, step, state, problem.batches, rating(scores, scored_at)
            )
    if pending is not None:
        record(*pending)
    progress.close()
    if why not in SIGNALS and scored_at != step:
        scores, scored_at = score(step, state), step
    if checkpoints.latest_step() != step:
        checkpoints.save(step, state, problem.batches, rating(scores, scored_at))
    checkpoints.wait()
    if why in SIGNALS:
        _say(f"{why}: saved step {step} of {cfg.steps}; resume to continue.")
        return {"step": step, **scores}
    if why:
        _say(f"Stopped at step {step} of {cfg.steps}: {why}; resume to continue.")
    _show_results(cfg, problem, run, state, scores)
    return {"step": step, **scores}


def _check_continues(
    cfg: RunConfig, checkpoints: Checkpoints, run: Path, saved: int, resume: bool
) -> None:
    if not resume:
        raise CheckpointError(
            f"{run} already holds a run, saved at step {saved}. Resume it, or give the "
            "new one another name."
        )
    before, now = checkpoints.load_config(), checkpoints.config
    differing = config.differences(
        {name: before.get(name) for name in cfg.fixed},
        {name: now.get(name) for name in cfg.fixed},
        labels=("in the run", "now"),
    )
    if differing:
        raise CheckpointError(
            f"{run} is another run: {'; '.join(differing)}. Continue it as it was, or "
            "give the new one another name."
        )
    elsewhere = dict.fromkeys(("directory", "root"))  # that is no other setting
    changed = config.differences(
        before | elsewhere, now | elsewhere, labels=("before", "now")
    )
    if changed:
        _say(f"{run} goes on with other settings: {'; '.join(changed)}.")


def _keep(files: Mapping[str, Path], run: Path) -> None:
    if jax.process_index() == 0:
        for name, path in files.items():
            try:
                shutil.copyfile(path, run / f"{name}.tmp")
                os.replace(run / f"{name}.tmp", run / name)
            except OSError as error:
                log.warning("%s keeps no copy of %s: %s", run, path, error)


def _on_the_mesh(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape, on every device where the problem does not say on which."""
    if shape.sharding is not None:
        return shape
    everywhere = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=everywhere)


def _check_same_shapes(abstract: Any, state: Any) -> None:
    """Refuse a state that the next step, or a resumed run, could not take."""
    wanted, structure = jax.tree.flatten(abstract)
    leaves, now = jax.tree.flatten(state)
    if structure != now:
        raise TypeError(
            f"A step returned a state of another structure, {now}, but a state stays "
            f"as it began: {structure}."
        )
    for i, (a, b) in enumerate(zip(wanted, leaves, strict=True)):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            path, _ = jax.tree.leaves_with_path(abstract)[i]
            raise TypeError(
                f"A step returned state{jax.tree_util.keystr(path)} as {b.dtype}"
                f"{list(b.shape)}, but a state keeps its shapes and dtypes, and this "
                f"began as {a.dtype}{list(a.shape)}."
            )


def _reached(until: float | None, problem: Problem, scores: Mapping) -> bool:
    if until is None:
        return False
    score = scores[problem.goal]
    return score >= until if problem.greater else score <= until


def _save_or_warn(checkpoints, step, state, batches, rating) -> None:
    """A save that fails costs nothing but itself: warn, go on, save again later."""
    try:
        checkpoints.save(step, state, batches, rating)
    except CheckpointError as error:
        log.warning("%s", error)


def _not_finite(
    step: int, values: dict[str, float], checkpoints: Checkpoints, advice: str
) -> str:
    with contextlib.suppress(CheckpointError):
        checkpoints.wait()
    listed = ", ".join(f"{name} {value}" for name, value in values.items())
    saved = checkpoints.latest_step()
    last = (
        "no checkpoint was written before"
        if saved is None
        else f"the last good checkpoint is step {saved} in {checkpoints.directory}"
    )
    return f"Step {step} is not finite ({listed}); {last}. {advice}"


def _peak_flops(mesh: Mesh) -> float | None:
    peaks = [peak_flops(device) for device in mesh.local_devices]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) * jax.process_count() if len(known) == len(peaks) else None


def _say(text: str) -> None:
    if jax.process_index() == 0:
        tell(text + "\n")


def _show_results(
    cfg: RunConfig, problem: Problem, run: Path, state: Any, scores: dict[str, float]
) -> None:
    """The scores beside simpler models', the picture, and a sample."""
    curve = problem.curve(scores)
    beside = ", ".join(f"{name} {x:.2f}" for name, x in curve.baselines.items())
    text = problem.describe(scores)
    text = text[:1].upper() + text[1:]
    _say(text + (f" ({beside})" if beside else "") + ".")
    if jax.process_index() == 0:
        try:
            plot_losses(
                run / "metrics.jsonl",
                run / curve.file,
                baselines=curve.baselines,
                train=f"train/{curve.train}",
                held_out=f"{problem.split}/{curve.held_out}",
                names=curve.labels,
                ylabel=curve.unit,
                title=cfg.name,
            )
            _say(f"Picture: {run / curve.file}")
        except (ImportError, OSError, ValueError) as error:
            _say(f"No picture was drawn: {error}")
    sample = problem.sample(state)
    if sample is not None:
        _say(sample)
