"""Helpers for the scores of experiments."""

import math
from typing import Any

import jax
import numpy as np

from jaxlab import evaluation
from jaxlab.training import Run, TaskData
from jaxlab.training.source import AnyTask, open_source

TEST_SEED = 1_000_000
"""Added to a run's seed for the samples that it is scored on, which no evaluation
during training has used. Runs with the same seed are scored on the same samples."""


def test_batches(run: Run, task: AnyTask, rows: int, batch_size: int = 64):
    """Batches of fresh samples of a task, which may differ from the run's own."""
    data = TaskData(task, eval_rows=rows)
    return open_source(data, batch_size, run.config.seed + TEST_SEED).heldout()


def task_scores(
    run: Run, task: AnyTask, rows: int, batch_size: int = 64
) -> dict[str, Any]:
    """Evaluate a run on fresh samples of a task, see `jaxlab.evaluation.evaluate`."""
    batches = test_batches(run, task, rows, batch_size)
    with jax.set_mesh(run.mesh):
        return evaluation.evaluate(run.params, run.config.model, batches, run.mesh)


def trained_task[T](run: Run, kind: type[T]) -> T:
    """The task that a run was trained on."""
    assert isinstance(run.config.data, TaskData)
    assert isinstance(run.config.data.task, kind)
    return run.config.data.task


def listed(values) -> list[float | None]:
    """Convert an array for JSON, rounded to four digits, with None for NaN."""
    return [None if math.isnan(x) else round(float(x), 4) for x in np.asarray(values)]
