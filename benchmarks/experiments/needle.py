"""MoM and others: recall of one value hidden in filler, by its depth.

Papers: Du et al., MoM, arXiv 2502.13685, section 4 (long-range tasks); the task is from
Hsieh et al., RULER, arXiv 2404.06654, section 3, over random tokens.
Expected: gated layers keep a needle at any depth if it can be told from the filler, and
larger states keep it over more filler; attention always recalls it.
Command: python scripts/experiment.py needle
Minutes on two cores: about 75.

Differs from the papers in: random filler instead of text. The layers and the training
are those of `recall`. Tested at 1, 4 and 16 times the trained length.
"""

import dataclasses
from typing import Any

import jax

from benchmarks.experiments import figures, scoring
from benchmarks.experiments.recall import mixers, train_config
from jaxlab.data import NeedleInHaystack
from jaxlab.evaluation import recall_by_depth
from jaxlab.training import Run, TrainConfig

TEST_ROWS = 256
TIMES = (1, 4, 16)  # multiples of the trained length
DEPTHS = 8


def cells(scale: str) -> dict[str, tuple[TrainConfig, ...]]:
    """One task with many layers."""
    if scale == "gpu":
        task = NeedleInHaystack(length=1024, value_length=8)
        layers, training = mixers(128, 2, 32), dict(batch_size=256, steps=10_000)
    else:
        task = NeedleInHaystack(length=64)
        layers, training = mixers(64, 2, 8), dict(batch_size=32, steps=1500)
    return {
        label: (train_config(task, mixer, scale, **training),)
        for label, mixer in layers.items()
    }


def score(run: Run) -> dict[str, Any]:
    """The share of the value's tokens that are right, in all and by depth."""
    trained, scores = scoring.trained_task(run, NeedleInHaystack), {}
    for times in TIMES:
        task = dataclasses.replace(trained, length=times * trained.length)
        batches = scoring.test_batches(run, task, TEST_ROWS, 64 // times)
        with jax.set_mesh(run.mesh):
            by_depth = recall_by_depth(
                run.params, run.config.model, batches, run.mesh, bins=DEPTHS
            )
        accuracy, weight = by_depth["accuracy"], by_depth["weight"]
        right = accuracy * weight
        scores[f"length {task.length}"] = float(right.sum() / weight.sum())
        scores[f"by depth, length {task.length}"] = scoring.listed(accuracy)
    return scores


def figure(results: dict) -> figures.Figure:
    """Draw a map of depth and length for each layer: the mean over the seeds."""
    labels = list(results["cells"])
    columns = min(5, len(labels))
    rows = -(-len(labels) // columns)
    drawing, axes = figures.panels(columns, rows, width=2.6, height=2.4)
    for ax in axes.flat[len(labels) :]:
        ax.set_axis_off()
    image = None
    for ax, label in zip(axes.flat, labels, strict=False):
        summary = results["cells"][label]["summary"]
        names = [name for name in summary if name.startswith("by depth")]
        recall = [[s["mean"] if s else 0.0 for s in summary[name]] for name in names]
        image = ax.imshow(recall, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        ax.set_title(label, fontsize=9)
        ax.set_yticks(range(len(names)), [name.split()[-1] for name in names])
        ax.set_xticks([0, len(recall[0]) - 1], ["first", "last"])
    if image is not None:
        drawing.colorbar(image, ax=axes, label="tokens of the value right")
    drawing.supxlabel("place of the needle")
    drawing.supylabel("length")
    return drawing
