"""Run a paper's experiment: python scripts/experiment.py state_tracking [--seeds 3].

Trains the cells that have no result yet and writes benchmarks/results/<name>.json and
.png. Stop it with Ctrl-C; the same command continues. --list shows the cells, and how
many of their runs are finished.
"""

import sys
from typing import Annotated, Literal

import tyro

from benchmarks.command_line import sentences
from benchmarks.experiments import EXPERIMENTS, runner


def main(
    name: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="NAME", help=f"One of {', '.join(EXPERIMENTS)}."),
    ],
    seeds: int = 3,
    jobs: int = 2,
    only: str = "*",
    scale: Literal["cpu", "gpu"] = "cpu",
    list: bool = False,
) -> None:
    """Run an experiment of benchmarks/experiments.

    Args:
        name: The name of a module in benchmarks/experiments.
        seeds: The number of runs of each cell, each with its own seed.
        jobs: The number of runs at a time; on a CPU each has its own core.
        only: A glob of the labels of cells, such as "S3 *".
        scale: Sizes for two CPU cores, or the paper's sizes for a GPU.
        list: Show the labels of the cells, and how many of their runs are finished.
    """
    if name not in EXPERIMENTS:
        raise ValueError(
            f"There is no experiment {name!r}; choose from {', '.join(EXPERIMENTS)}."
        )
    module = f"benchmarks.experiments.{name}"
    if list:
        show(module, seeds, scale)
        return
    try:
        path = runner.run(module, seeds=seeds, jobs=jobs, only=only, scale=scale)
    except runner.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal)
    print(f"Wrote {path} and {path.with_suffix('.png').name}.")


def show(module: str, seeds: int, scale: str) -> None:
    """Print the cells, and how many of their runs are finished."""
    _, cells, jobs = runner.prepare(module, seeds, scale)
    for label in cells:
        finished = runner.done(job for job in jobs if job.label == label)
        print(f"{label}: {finished} of {seeds} runs are finished")
    print(f"{runner.done(jobs)} of {len(jobs)} runs are finished.")


if __name__ == "__main__":
    with sentences():
        tyro.cli(main)
