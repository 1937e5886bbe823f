"""The loop of a search: step -> metrics -> scores -> checkpoint."""

import dataclasses
import logging
import math
import time
from pathlib import Path

import jax

from jaxlab import config, params
from jaxlab.checkpoint import CheckpointError, Checkpoints
from jaxlab.models import LMConfig
from jaxlab.objectives import NextToken, Objective
from jaxlab.params import MeshConfig
from jaxlab.training.loss_curve import plot_losses
from jaxlab.training.metrics import MetricWriter
from jaxlab.training.search.fine_tuning import FineTuning
from jaxlab.training.search.integers import IntegerTraining
from jaxlab.training.search.policies import PolicySearch
from jaxlab.training.search.problem import Problem
from jaxlab.training.source import TextData
from jaxlab.training.stopping import SIGNALS, stop_signals, why_stop

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """A search. `configs/` holds one of these a file."""

    name: str = "search"  # of the directory under `directory`
    directory: str = "runs"  # where runs put checkpoints, metrics and pictures
    task: PolicySearch | FineTuning | IntegerTraining = PolicySearch()
    mesh: MeshConfig = MeshConfig()  # data and fsdp divide populations (of floats)
    steps: int = 100  # generations, or updates of a policy gradient
    seed: int = 0  # of first parameters, noise and data
    until: float | None = None  # stop where the score is as good as this
    max_minutes: float | None = None  # stop after so long, with a checkpoint
    log_every: int = 1  # steps between lines of metrics
    eval_every: int = 10  # steps between scores
    checkpoint_every: int = 100  # steps between checkpoints
    keep: int = 3  # newest checkpoints kept

    def __post_init__(self):
        for name in ("steps", "log_every", "eval_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    @property
    def model(self) -> LMConfig | None:
        """The language model that is searched, if it is one."""
        return self.task.model if isinstance(self.task, FineTuning) else None

    @property
    def learned(self) -> Objective | None:
        """What the run that a fine-tuning starts from has learned."""
        return None if self.model is None else NextToken(self.model)

    @property
    def data(self) -> TextData | None:
        """What that model was trained on."""
        return self.task.data if isinstance(self.task, FineTuning) else None


def search(cfg: SearchConfig, *, resume: bool = False) -> dict[str, float]:
    """Run a search to its end.

    Everything goes to ``<directory>/<name>``, as of `jaxlab.training.train`, whose
    signals and --resume it shares.

    Args:
        cfg: the run.
        resume: continue from the newest complete checkpoint; without one, start.

    Returns:
        ``step``, and the last scores.

    Raises:
        ValueError: parts of the config do not fit each other or the devices.
        CheckpointError: the directory holds another run.
        FloatingPointError: a figure of a step is not finite.
    """
    if isinstance(cfg.task, FineTuning):
        cfg = dataclasses.replace(cfg, task=cfg.task.resolved())
    run = Path(cfg.directory) / cfg.name
    mesh = params.make_mesh(cfg.mesh)
    checkpoints = Checkpoints(
        run / "checkpoints", config=config.to_json(cfg), keep=cfg.keep, keep_best=0
    )
    saved = checkpoints.latest_step()
    if saved is not None:
        _check_continues(cfg, checkpoints, run, resume)
    with (
        jax.set_mesh(mesh),
        checkpoints,
        MetricWriter(run) as writer,
        stop_signals() as received,
    ):
        problem = cfg.task.open(cfg.steps, cfg.seed)
        state, step = problem.state, 0
        scores, scored_at, why, warned = {}, None, None, set()
        if saved is not None:
            step, state = checkpoints.restore(jax.tree.map(_abstract, state))
            scores, scored_at = problem.score(state), step
        writer.truncate_after(step)
        _say(f"{run}: {problem.headline}, {cfg.steps} steps")
        started = time.monotonic()
        while step < cfg.steps:
            if scored_at == step and _reached(cfg, problem, scores):
                why = f"{problem.held_out} has reached {cfg.until:g}"
                break
            if why := why_stop(cfg, step, started, received):
                break
            begin = time.monotonic()
            state, figures = jax.block_until_ready(problem.step(state, step))
            step, seconds = step + 1, time.monotonic() - begin
            _check_finite(step, figures)
            warned = _warn_once(step, figures, warned)
            if step % cfg.log_every == 0 or step == cfg.steps:
                writer.write(step, {f"train/{k}": v for k, v in figures.items()})
            if step % cfg.eval_every == 0 or step == cfg.steps:
                scores, scored_at = problem.score(state), step
                writer.write(step, {f"score/{k}": v for k, v in scores.items()})
                _say(_line(cfg, problem, step, figures, scores, seconds))
            if step % cfg.checkpoint_every == 0 and step < cfg.steps:
                checkpoints.save(step, state)
        if why not in SIGNALS and scored_at != step:
            scores = problem.score(state)
            writer.write(step, {f"score/{k}": v for k, v in scores.items()})
        if checkpoints.latest_step() != step:
            checkpoints.save(step, state)
        checkpoints.wait()
        if why:
            _say(f"Stopped at step {step} of {cfg.steps}: {why}.")
        if why not in SIGNALS:
            _draw(cfg, problem, run)
    return {"step": step, **scores}


def _check_continues(cfg: SearchConfig, checkpoints: Checkpoints, run, resume) -> None:
    if not resume:
        raise CheckpointError(
            f"{run} already holds a run, saved at step {checkpoints.latest_step()}. "
            "Continue it with --resume, or give the new one another --name."
        )
    before, now = checkpoints.load_config(), checkpoints.config
    found = config.differences(
        *(
            {name: saved.get(name) for name in ("task", "seed")}
            for saved in (before, now)
        ),
        labels=("in the run", "now"),
    )
    if found:
        raise CheckpointError(
            f"{run} is another search: {'; '.join(found)}. Continue it as it was, or "
            "give the new one another --name."
        )


def _check_finite(step: int, figures: dict) -> None:
    found = {name: float(x) for name, x in figures.items()}
    if not all(map(math.isfinite, found.values())):
        raise FloatingPointError(
            f"Step {step} is not finite ({found}); nothing was saved of it. Try a "
            "lower --task.optimizer.learning-rate, or a smaller sigma."
        )


def _warn_once(step: int, figures: dict, warned: set[str]) -> set[str]:
    """Say what a compiled step cannot refuse; all that was said so far."""
    found = {}
    if float(figures.get("no_signal", 0)) == 1:
        found["no_signal"] = (
            "everything got the same fitness or reward, so nothing was learned from "
            "it; try larger noise, or a finer fitness"
        )
    if float(figures.get("not_finite", 0)) > 0:
        found["not_finite"] = (
            "the fitness of some members is not finite and counts as the worst; try a "
            "smaller sigma"
        )
    for name in found.keys() - warned:
        log.warning("Step %d: %s.", step, found[name])
    return warned | found.keys()


def _abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _reached(cfg: SearchConfig, problem: Problem, scores: dict[str, float]) -> bool:
    if cfg.until is None:
        return False
    found = scores[problem.held_out]
    return found >= cfg.until if problem.greater else found <= cfg.until


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _line(cfg, problem: Problem, step, figures, scores, seconds: float) -> str:
    own = f"{problem.train} {float(figures[problem.train]):.4g}"
    found = ", ".join(f"{name} {x:.4g}" for name, x in scores.items())
    return f"step {step}/{cfg.steps}  {own}, {found}  {seconds:.2g} s"


def _draw(cfg: SearchConfig, problem: Problem, run: Path) -> None:
    if jax.process_index() != 0:
        return
    try:
        plot_losses(
            run / "metrics.jsonl",
            run / "scores.png",
            baselines=problem.baselines,
            train=f"train/{problem.train}",
            held_out=f"score/{problem.held_out}",
            names=(problem.train, problem.held_out),
            ylabel=problem.unit,
            title=cfg.name,
        )
        _say(f"Scores: {run / 'scores.png'}")
    except (ImportError, OSError, ValueError) as error:
        _say(f"No scores were drawn: {error}")
