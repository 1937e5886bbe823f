"""Mamba: induction heads, trained at one length and tested at longer ones.

Paper: Gu and Dao, Mamba, arXiv 2312.00752, section 4.1.2 and table 2.
Expected: Mamba, trained at length 256, is right at every longer length; attention is
right only near the trained length; RetNet, whose decay is fixed, forgets.
Command: python scripts/experiment.py induction
Minutes on two cores: about 30.

Differs from the paper in: the sizes of configs/induction_heads.py, with three times its
updates, because some layers learn more slowly than Mamba; lengths up to 64 times the
trained one (in the paper 4096 times); and RetNet instead of a time-invariant S4.
"""

import dataclasses
from typing import Any

from benchmarks.experiments import figures, scoring
from benchmarks.experiments.selective_copying import with_layers
from benchmarks.record import ROOT
from jaxlab import config
from jaxlab.data import InductionHeads
from jaxlab.training import Run, TrainConfig

TIMES = (1, 2, 4, 8, 16, 64)  # multiples of the trained length
TEST_ROWS = 128
TOKENS = 4096  # in a test batch, so that attention's scores fit for the longest rows


def cells(scale: str) -> dict[str, tuple[TrainConfig, ...]]:
    """configs/induction_heads.py with each of the layers."""
    base = config.load(ROOT / "configs" / "induction_heads.py")
    base = dataclasses.replace(base, steps=1800)  # enough for the slowest layers
    if scale == "gpu":
        base = dataclasses.replace(base, batch_size=8, steps=200_000)
    return with_layers(base)


def score(run: Run) -> dict[str, Any]:
    """The share of rows answered right, by length."""
    trained, scores = scoring.trained_task(run, InductionHeads), {}
    for times in TIMES:
        task = dataclasses.replace(trained, length=times * trained.length)
        rows = max(1, TOKENS // task.length)
        evaluated = scoring.task_scores(run, task, TEST_ROWS, rows)
        scores[f"length {task.length}"] = evaluated["accuracy"]
    return scores


def figure(results: dict) -> figures.Figure:
    """Plot accuracy over the length, with a line for each layer."""
    drawing, axes = figures.panels(1, width=6, height=4)
    ax = axes[0, 0]
    for colour, (label, cell) in zip(
        figures.COLOURS, results["cells"].items(), strict=False
    ):
        lengths = [int(name.split()[1]) for name in cell["summary"]]
        figures.band(ax, lengths, cell["summary"].values(), label, color=colour)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="length", ylabel="rows answered right", ylim=(-0.02, 1.02))
    ax.legend(frameon=False)
    return drawing
