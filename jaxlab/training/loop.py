"""The training loop: data -> step -> metrics -> evaluation -> checkpoint."""

import contextlib
import dataclasses
import functools
import logging
import math
import operator
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlab import config, params
from jaxlab.checkpoint import CheckpointError, Checkpoints
from jaxlab.inference import generate
from jaxlab.objectives import heldout_scores
from jaxlab.optimizers import build_for, events, tapped_by
from jaxlab.training.batches import StepBatches
from jaxlab.training.config import TrainConfig
from jaxlab.training.loss_curve import plot_losses
from jaxlab.training.metrics import MetricWriter
from jaxlab.training.peaks import peak_flops
from jaxlab.training.progress import Progress
from jaxlab.training.source import Source, open_source
from jaxlab.training.state import TrainState, abstract_state, create_state
from jaxlab.training.step import make_train_step
from jaxlab.training.stopping import SIGNALS, stop_signals, why_stop

log = logging.getLogger(__name__)

MAY_DIFFER = ("model.remat", "model.compute_dtype")
"""Fields of a model that parameters do not depend on."""


def train(cfg: TrainConfig, *, resume: bool = False) -> dict[str, float]:
    """Run a training config to its end.

    Everything goes to ``<directory>/<name>``: ``checkpoints/``, ``metrics.jsonl``,
    TensorBoard files and ``loss.png``. SIGTERM and Ctrl-C save a checkpoint and return.
    The losses after a resume are those of a run that was never stopped, bit for bit on
    the same devices.

    Args:
        cfg: the run.
        resume: continue from the newest complete checkpoint; without one, start.

    Returns:
        ``step``, and the scores of the last evaluation on held-out data.

    Raises:
        ValueError: parts of the config do not fit each other, the devices or the data.
        CheckpointError: the directory holds another run, another model or other data,
            or the last checkpoint could not be written.
        FloatingPointError: the loss or the gradient is not finite.
    """
    run = Path(cfg.directory) / cfg.name
    mesh = params.make_mesh(cfg.mesh)
    checkpoints = Checkpoints(
        run / "checkpoints",
        config=config.to_json(cfg),
        keep=cfg.keep,
        keep_best=cfg.keep_best,
        may_differ=MAY_DIFFER,
    )
    saved = checkpoints.latest_step()
    if saved is not None and not resume:
        raise CheckpointError(
            f"{run} already holds a run, saved at step {saved}. Continue it with "
            "--resume, or give the new one another --name."
        )
    source = open_source(cfg.data, cfg.batch_size, cfg.seed, resumes=saved is not None)
    batches = StepBatches(source.train, cfg)
    _check_fit(cfg, source, mesh)
    objective, specs = cfg.learned, cfg.learned.spec()
    frozen = [(pattern, False) for pattern in cfg.frozen]
    trainable = params.select(specs, [*frozen, (".*", True)])
    optimizer = build_for(cfg.optimizer, specs, cfg.steps, trainable)
    peak = _peak_flops(mesh)
    with (
        jax.set_mesh(mesh),
        checkpoints,
        MetricWriter(run) as writer,
        stop_signals() as received,
    ):
        if saved is None:
            state, step = _first_state(cfg, optimizer, mesh), 0
        else:
            abstract = abstract_state(specs, optimizer, mesh)
            step, state = checkpoints.restore(abstract, batches)
        writer.truncate_after(step)
        _say(_headline(cfg, mesh, source, run, step))
        started = time.monotonic()
        progress = Progress(
            cfg.steps,
            flops_per_token=flops_per_token(specs),
            peak_flops=peak,
        )

        sentences = events(state.opt_state)
        shown_rows = cfg.batch_size if step == 0 else None

        def record(step: int, metrics: dict, rows: int, seen: int) -> None:
            nonlocal shown_rows
            values = {name: float(value) for name, value in metrics.items()}
            if not all(map(math.isfinite, values.values())):
                progress.close()
                raise FloatingPointError(_not_finite(step, values, checkpoints))
            for name, sentence in sentences.items():
                if values.pop(name) == step:
                    progress.message(f"step {step}: {sentence}")
                    writer.write(step, {f"train/{name}": step})
            if shown_rows not in (None, rows):
                progress.message(f"step {step}: the batch is now {rows} rows")
            shown_rows = rows
            tokens = seen * source.row_length
            values |= {"rows": rows, "tokens": tokens}
            if cfg.growth is not None:
                squares = values["part_squares"], values["mean_square"]
                values["wanted_rows"] = batches.tested(*squares)
            progress.update(step, values["loss"], tokens)
            if step % cfg.log_every == 0 or step == cfg.steps:
                writer.write(step, {f"train/{k}": v for k, v in values.items()})

        def score(step: int, state: TrainState) -> dict[str, float]:
            scores = heldout_scores(objective, state.params, source.heldout(), mesh)
            scores = {k: v for k, v in scores.items() if isinstance(v, float)}
            writer.write(step, {f"heldout/{k}": v for k, v in scores.items()})
            progress.message(f"step {step}: held-out {_shown(scores)}")
            return scores

        tapped = tapped_by(cfg.optimizer, specs)
        if tapped is not None:
            tapped = jax.tree.map(operator.and_, tapped, trainable)
        learned = trainable if cfg.frozen else None
        key = jax.random.key(cfg.seed)

        @functools.cache
        def train_step(parts: int):
            tests = cfg.growth is not None
            return make_train_step(objective, optimizer, parts, tapped, tests, learned)

        scores, scored_at, pending, why = {}, None, None, None
        while step < cfg.steps:
            if why := why_stop(cfg, step, started, received):
                break
            taken = next(batches)
            batch = params.place_rows(taken.batch, mesh)
            draws = jax.random.fold_in(key, step)
            state, metrics = train_step(taken.parts)(state, batch, draws)
            if pending is not None:  # the step before, while this one is computed
                record(*pending)
            step += 1
            pending = step, metrics, taken.rows, taken.rows_seen
            evaluates = step % cfg.eval_every == 0 or step == cfg.steps
            saves = step % cfg.checkpoint_every == 0 and step < cfg.steps
            if evaluates or saves:  # nothing that is not finite is scored or saved
                record(*pending)
                pending = None
            if evaluates:
                scores, scored_at = score(step, state), step
            if saves:
                loss = scores if scored_at == step else None
                _save_or_warn(checkpoints, step, state, batches, loss)
        if pending is not None:
            record(*pending)
        progress.close()
        if why not in SIGNALS and scored_at != step:
            scores, scored_at = score(step, state), step
        if checkpoints.latest_step() != step:
            loss = scores if scored_at == step else None
            checkpoints.save(step, state, batches, loss)
        checkpoints.wait()
        if why in SIGNALS:
            _say(f"{why}: saved step {step} of {cfg.steps}; --resume continues.")
            return {"step": step, **scores}
        if why:
            _say(f"Stopped at step {step} of {cfg.steps}: {why}; --resume continues.")
        _show_results(cfg, run, source, state, scores)
    return {"step": step, **scores}


def _first_state(cfg: TrainConfig, optimizer, mesh: Mesh) -> TrainState:
    """New parameters, or those that another run ended with."""
    specs = cfg.learned.spec()
    state = create_state(specs, optimizer, mesh, cfg.seed)
    if cfg.init_from is None:
        return state
    other = Checkpoints(
        Path(cfg.init_from) / "checkpoints",
        config=config.to_json(cfg),
        may_differ=MAY_DIFFER,
    )
    wanted = abstract_state(specs, optimizer, mesh).params
    step, arrays = other.restore(wanted, subtree="params")
    _say(f"Starting from the parameters of {cfg.init_from} at step {step}.")
    return dataclasses.replace(state, params=arrays)


def _check_fit(cfg: TrainConfig, source: Source, mesh: Mesh) -> None:
    reads_tokens = cfg.objective is None
    if reads_tokens and source.vocab_size > cfg.model.vocab_size:
        raise ValueError(
            f"The data has {source.vocab_size} token ids but model.vocab_size is "
            f"{cfg.model.vocab_size}; set --model.vocab-size {source.vocab_size} or "
            "more."
        )
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if cfg.batch_size % (parts * cfg.accumulate):
        raise ValueError(
            f"batch_size={cfg.batch_size} does not divide over {parts} devices (mesh "
            f"axes data and fsdp) and accumulate={cfg.accumulate} parts; choose a "
            f"multiple of {parts * cfg.accumulate}."
        )
    if source.row_length % mesh.shape["sequence"]:
        raise ValueError(
            f"Rows of {source.row_length} tokens do not divide over the mesh axis "
            f"sequence={mesh.shape['sequence']}."
        )


def _axis(cfg: TrainConfig, unit: str) -> str:
    """What the axis of the losses says."""
    if unit == "loss" and cfg.objective is None:
        return "loss (nats per target)"
    return unit.replace("_", " ")


def _save_or_warn(checkpoints, step, state, batches, loss) -> None:
    """A save that fails costs nothing but itself: warn, go on, save again later."""
    try:
        checkpoints.save(step, state, batches, loss)
    except CheckpointError as error:
        log.warning("%s", error)


def _not_finite(step: int, values: dict[str, float], checkpoints: Checkpoints) -> str:
    with contextlib.suppress(CheckpointError):
        checkpoints.wait()
    shown = ", ".join(f"{name} {value}" for name, value in values.items())
    saved = checkpoints.latest_step()
    last = (
        "no checkpoint was written before"
        if saved is None
        else f"the last good checkpoint is step {saved} in {checkpoints.directory}"
    )
    return (
        f"Step {step} is not finite ({shown}); {last}. Try a lower "
        "--optimizer.learning-rate, a longer --optimizer.schedule.warmup or a smaller "
        "--optimizer.clip; in bfloat16, try --model.compute-dtype float32."
    )


def flops_per_token(specs: Any) -> float:
    """Operations of a training step a token: 6 a parameter that multiplies.

    Two forward and four backward; the scores of attention and the recurrences of other
    mixers are left out, so utilisation is understated where they matter.
    """
    leaves = jax.tree.leaves(specs)
    roles = {spec.role for spec in leaves}
    # A table beside a head is looked up, and so not multiplied by.
    looked_up = [s for s in leaves if s.role == "embedding" and "head" in roles]
    return 6.0 * (params.count(leaves) - params.count(looked_up))


def _peak_flops(mesh: Mesh) -> float | None:
    peaks = [peak_flops(device) for device in mesh.local_devices]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) * jax.process_count() if len(known) == len(peaks) else None


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _headline(cfg, mesh, source, run, step) -> str:
    kind = mesh.devices.flat[0].device_kind
    start = "" if step == 0 else f", continuing after step {step}"
    rows = str(cfg.batch_size)
    if cfg.growth is not None:
        rows += f" to {cfg.growth.largest}"
    return (
        f"{run}: {params.count(cfg.learned.spec()):,} parameters, "
        f"{cfg.steps} steps of {rows} x {source.row_length} tokens on "
        f"{mesh.size} {kind}{start}"
    )


def _shown(scores: dict[str, float]) -> str:
    if "bits_per_byte" in scores:
        return f"{scores['bits_per_byte']:.3f} bits per byte"
    shown = f"loss {scores['loss']:.3f}"
    if "accuracy" in scores:
        shown += f", accuracy {scores['accuracy']:.1%}"
    return shown


def _show_results(
    cfg: TrainConfig, run: Path, source: Source, state: TrainState, scores: dict
) -> None:
    """The scores beside simpler models', the loss curve, and a sample of text."""
    beside = ", ".join(f"{name} {x:.2f}" for name, x in source.baselines.items())
    _say(f"Held-out: {_shown(scores)}" + (f" ({beside})" if beside else "") + ".")
    unit = "bits_per_byte" if "bits_per_byte" in scores else "loss"
    if jax.process_index() == 0:
        try:
            plot_losses(
                run / "metrics.jsonl",
                run / "loss.png",
                baselines=source.baselines,
                train=f"train/{unit}",
                held_out=f"heldout/{unit}",
                ylabel=_axis(cfg, unit),
                title=cfg.name,
            )
            _say(f"Loss curve: {run / 'loss.png'}")
        except (ImportError, OSError, ValueError) as error:
            _say(f"No loss curve was drawn: {error}")
    if source.tokenizer is None or cfg.objective is not None:
        return
    prompt = [source.tokenizer.separator, *source.tokenizer.encode(cfg.prompt)]
    tokens = generate(
        state.params,
        jnp.array([prompt], jnp.int32),
        cfg.model,
        cfg.sampling,
        vocab_size=source.vocab_size,
    )
    text = source.tokenizer.decode(np.asarray(tokens)[0])
    _say(f"A sample after {cfg.prompt!r}:\n{cfg.prompt}{text}")
