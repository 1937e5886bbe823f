"""Run the cells of an experiment over seeds, each in a process pinned to a core.

Small models gain nothing from a second thread, so two pinned runs at a time are almost
twice as fast as one after the other. Every finished run is a file, named by its label,
the fingerprint of its configs and its seed: an experiment that was interrupted
continues where it stopped, and the results are assembled from all finished runs. The
assembled results include every run, so a fresh clone continues from those.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks import record as recording
from jaxlab import config
from jaxlab.training import TrainConfig

FINISHED = recording.ROOT / "runs" / "experiments"
"""Folder of finished runs, which is not part of the repository."""

PLACE_AND_SEED = ("name", "directory", "root", "seed")  # of a run, not of its making
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Cell = tuple[TrainConfig, ...]
"""The stages of a run; each starts from the parameters of the one before."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: a cell and a seed."""

    label: str
    seed: int
    path: pathlib.Path  # file of its result


class Stopped(Exception):
    """A signal has stopped the runs; those that were finished are kept."""

    def __init__(self, number: int, sentence: str):
        super().__init__(sentence)
        self.signal = number


def run(
    module: str,
    *,
    seeds: int = 3,
    jobs: int = 2,
    only: str = "*",
    scale: str = "cpu",
    finished: pathlib.Path = FINISHED,
) -> pathlib.Path:
    """Do the missing runs, then write the results and the figure.

    Args:
        module: import name of the experiment.
        seeds: runs of each cell, with seeds 0, 1, ...
        jobs: processes at a time; at scale "cpu" each has its own core.
        only: glob of labels; results of other cells are kept and assembled too.
        scale: "cpu" or "gpu".
        finished: folder of finished runs.

    Returns:
        The path of the results; the figure is in the same folder.

    Raises:
        ValueError: no label matches `only`, a number is outside its range, or the
            results have more runs than there would be; nothing is trained.
        RuntimeError: runs failed; the others are finished and kept.
        Stopped: by SIGINT, SIGTERM or SIGHUP; the finished runs are kept.
    """
    experiment = importlib.import_module(module)
    name, cells, planned = prepare(module, seeds, scale, finished)
    selected = [job for job in planned if fnmatch.fnmatchcase(job.label, only)]
    if not selected:
        raise ValueError(
            f"No cell of {name} matches {only!r}; choose from {list(cells)}."
        )
    missing = [job for job in selected if not job.path.exists()]
    where, before = cores(jobs, scale), recorded_runs(name)
    after = done(planned) + len(missing)
    if after < before:
        raise ValueError(
            f"{recording.RESULTS / name}.json has {before} runs, but {after} would "
            "be finished after this, so nothing is run; run the others too (more "
            "--seeds, no --only), or remove the file first."
        )
    with stop_signals() as received:
        failed = work(module, scale, missing, where, received)
    if received:
        raise Stopped(
            received[0],
            f"Stopped; {done(selected)} of {len(selected)} runs are finished and kept; "
            "the same command continues.",
        )
    failure = RuntimeError(
        f"{len(failed)} of {len(missing)} runs failed; see their logs: "
        + ", ".join(str(log_of(job)) for job in failed)
    )
    if failed and done(planned) < max(1, before):
        raise failure
    path = assemble(name, scale, cells, planned)
    figure = experiment.figure(json.loads(path.read_text()))
    figure.savefig(path.with_suffix(".png"))
    if failed:
        raise failure
    return path


def prepare(
    module: str, seeds: int, scale: str, finished: pathlib.Path = FINISHED
) -> tuple[str, dict[str, Cell], list[Job]]:
    """The name, the cells and the runs of an experiment.

    Those that its recorded results have are finished then.

    Raises:
        ValueError: `seeds` is below 1.
    """
    if seeds < 1:
        raise ValueError(f"--seeds {seeds} must be at least 1.")
    experiment = importlib.import_module(module)
    name = module.rpartition(".")[2] + ("" if scale == "cpu" else f"_{scale}")
    cells, scoring = experiment.cells(scale), scoring_of(experiment)
    folder = finished / name
    folder.mkdir(parents=True, exist_ok=True)
    jobs = plan(cells, range(seeds), folder, scoring)
    unpack(name, cells, jobs, scoring)
    return name, cells, jobs


def done(jobs: Iterable[Job]) -> int:
    """The number of runs that are finished."""
    return sum(job.path.exists() for job in jobs)


def unpack(
    name: str, cells: dict[str, Cell], jobs: list[Job], scoring: int = 1
) -> None:
    """Copy the runs of these jobs from `results/<name>.json`, where it has them.

    A run is identified by its seed, its scoring and its configs, which the results
    contain in the format of the version that wrote them.
    """
    for label, cell in recorded(name).items():
        saved = [made_of(config.updated(x)) for x in (*cell["before"], cell["config"])]
        if label not in cells or saved != stages(cells[label]):
            continue
        shared = {size: cell[size] for size in ("parameters", "state_floats")}
        # The oldest results say these of a cell, not of each run.
        shared |= {"label": label, "commit": cell["commits"][-1]}
        shared |= {"device": cell["devices"][-1], "cpus": cell["cpus"][-1]}
        runs = {run["seed"]: run for run in cell["runs"]}
        for job in jobs:
            run = runs.get(job.seed) if job.label == label else None
            if run and run.get("scoring", 1) == scoring and not job.path.exists():
                job.path.write_text(json.dumps(shared | run))


def scoring_of(experiment: ModuleType) -> int:
    """The version of an experiment's scores: its `SCORING`, by default 1.

    Increase it when scores are computed in another way, so that old results are not
    mistaken for new ones.
    """
    return getattr(experiment, "SCORING", 1)


def plan(
    cells: dict[str, Cell],
    seeds: Iterable[int],
    folder: pathlib.Path,
    scoring: int = 1,
) -> list[Job]:
    """All runs, seed by seed, so that every cell has a result early.

    Args:
        cells: the cells of the experiment.
        seeds: the seeds of the runs.
        folder: folder of the results.
        scoring: version of the scores; each version has its own results.

    Raises:
        ValueError: two labels make the same file name.
    """
    jobs = [
        Job(label, seed, folder / f"{slug(label)}.{fingerprint(cell, scoring)}.{seed}")
        for seed in seeds
        for label, cell in cells.items()
    ]
    jobs = [dataclasses.replace(j, path=pathlib.Path(f"{j.path}.json")) for j in jobs]
    if len({job.path for job in jobs}) < len(jobs):
        raise ValueError(f"Two of the labels {list(cells)} make the same file name.")
    return jobs


def slug(label: str) -> str:
    """The label as a file name."""
    return re.sub(r"[^\w=+-]+", "_", label)


def fingerprint(cell: Cell, scoring: int) -> str:
    """Identifies everything that scores depend on, except the seed and the code."""
    text = json.dumps([stages(cell), scoring], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def stages(cell: Cell) -> list[dict]:
    """The configs of a run's stages as JSON, without name, directory, root, seed."""
    return [made_of(config.to_json(cfg)) for cfg in cell]


def made_of(cfg: dict) -> dict:
    """A config as JSON without name, directory, root and seed."""
    return {k: x for k, x in cfg.items() if k not in PLACE_AND_SEED}


def cores(jobs: int, scale: str) -> list[int]:
    """The core of each concurrent process; -1 lets a process use all of them."""
    if jobs < 1:
        raise ValueError(f"--jobs {jobs} must be at least 1.")
    if scale != "cpu":
        return [-1] * jobs
    available = sorted(os.sched_getaffinity(0))
    if jobs > len(available):
        raise ValueError(
            f"--jobs {jobs} must be from 1 to {len(available)}, the number of "
            "available cores, since each run has its own."
        )
    return available[:jobs]


def work(
    module: str, scale: str, jobs: list[Job], cores: list[int], received: list[int]
) -> list[Job]:
    """Run the jobs, one at a time on each core, and return those that failed.

    It ends, and its workers with it, once `received` holds a signal.
    """
    waiting, running, failed = list(jobs), {}, []
    started = time.monotonic()
    try:
        while (waiting or running) and not received:
            for core in range(len(cores)):
                if core not in running and waiting:
                    job = waiting.pop(0)
                    running[core] = job, start(module, scale, job, cores[core])
            time.sleep(0.2)
            for core, (job, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[core]
                if not job.path.exists():
                    failed.append(job)
                ended = len(jobs) - len(waiting) - len(running)
                outcome = "failed" if job in failed else shown(job)
                minutes = (time.monotonic() - started) / 60
                print(
                    f"[{ended}/{len(jobs)}, {minutes:.1f} min] {job.label}, "
                    f"seed {job.seed}: {outcome}",
                    flush=True,
                )
    finally:
        for job, process in running.values():
            stop(job, process)
    return failed


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives the numbers of signals, which then do nothing else.

    So none comes between the start of a worker and the note of it. A signal that is
    ignored, as SIGHUP is under nohup, stays ignored.
    """
    received: list[int] = []
    heard = [n for n in STOPPING if signal.getsignal(n) != signal.SIG_IGN]
    before = {n: signal.signal(n, lambda n, _: received.append(n)) for n in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(job: Job, process: subprocess.Popen) -> None:
    """End a worker, and remove what it wrote of its run."""
    process.kill()
    process.wait()
    for folder in job.path.parent.glob(f"{job.path.stem}.*/"):
        shutil.rmtree(folder)


ENVIRONMENT = {
    # All runs share the compiled programs.
    "JAX_COMPILATION_CACHE_DIR": str(recording.ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    # By default glibc returns large arrays to the system after every step and clears
    # new ones for the next, which takes a third of a small model's time.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_ARENA_MAX": "1",
}
"""Settings of a worker that change only its speed."""


def start(module: str, scale: str, job: Job, core: int) -> subprocess.Popen:
    """Start a worker in its own session, so that Ctrl-C reaches only this process."""
    arguments = [module, scale, job.label, str(job.seed), str(core), str(job.path)]
    with log_of(job).open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.experiments.worker", *arguments],
            cwd=recording.ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def log_of(job: Job) -> pathlib.Path:
    return job.path.with_suffix(".log")


def shown(job: Job) -> str:
    """The seconds of a run, and its scores that are single numbers."""
    result = json.loads(job.path.read_text())
    numbers = {k: x for k, x in result["scores"].items() if isinstance(x, float)}
    scores = ", ".join(f"{k} {x:.3f}" for k, x in numbers.items())
    return f"{result['seconds']:.0f} s" + (f", {scores}" if scores else "")


def assemble(
    name: str, scale: str, cells: dict[str, Cell], jobs: list[Job]
) -> pathlib.Path:
    """Write `results/<name>.json` from all finished runs."""
    results, finished = {}, 0
    for label, cell in cells.items():
        paths = [job.path for job in jobs if job.label == label and job.path.exists()]
        runs = [json.loads(path.read_text()) for path in paths]
        finished += len(runs)
        if not runs:
            continue
        results[label] = {
            "config": config.to_json(cell[-1]),
            "before": [config.to_json(cfg) for cfg in cell[:-1]],
            "parameters": runs[0]["parameters"],
            "state_floats": runs[0]["state_floats"],
            "commits": sorted({run["commit"] for run in runs}),
            "devices": sorted({run["device"] for run in runs}),
            "cpus": sorted({run["cpus"] for run in runs}),
            "runs": [
                {
                    k: x
                    for k, x in run.items()
                    if k not in ("parameters", "state_floats")
                }
                for run in runs
            ],
            "summary": summary([run["scores"] for run in runs]),
        }
    if finished < len(jobs):
        print(f"{finished} of {len(jobs)} runs of {name} are finished.", flush=True)
    before = recorded_runs(name)
    if finished < before:
        raise ValueError(
            f"{recording.RESULTS / name}.json has {before} runs, but only {finished} "
            "are finished here (they are kept); run the others too, or remove the file "
            "first."
        )
    return recording.record(name, scale=scale, cells=results)


def recorded(name: str) -> dict[str, Any]:
    """The cells in `results/<name>.json`; none if there is no such file."""
    exists = (recording.RESULTS / f"{name}.json").exists()
    return recording.results(name)["cells"] if exists else {}


def recorded_runs(name: str) -> int:
    """The number of runs in `results/<name>.json`."""
    return sum(len(cell["runs"]) for cell in recorded(name).values())


def summary(scores: list[Any]) -> Any:
    """The mean, standard deviation, minimum and maximum of every score over seeds."""
    first = scores[0]
    if isinstance(first, dict):
        return {name: summary([score[name] for score in scores]) for name in first}
    if isinstance(first, list):
        return [summary(list(values)) for values in zip(*scores, strict=True)]
    if None in scores:
        return None
    return {
        "mean": float(np.mean(scores)),
        "std": float(np.std(scores)),
        "min": min(scores),
        "max": max(scores),
    }
