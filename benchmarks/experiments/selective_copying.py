"""Mamba: selective copying, with layers whose decay does or does not depend on input.

Paper: Gu and Dao, Mamba, arXiv 2312.00752, section 4.1.1 and table 1.
Expected: layers whose gates depend on the input (Mamba, GLA, Gated DeltaNet) and
attention learn to copy; RetNet, whose decay is fixed, is the worst of them.
Command: python scripts/experiment.py selective_copying
Minutes on two cores: five times those of configs/selective_copying.py.

Differs from the paper in: the sizes of configs/selective_copying.py (in the paper:
length 4096, 400K steps), and RetNet instead of a time-invariant S4.
"""

import dataclasses
from typing import Any

from benchmarks.experiments import figures, scoring
from benchmarks.record import ROOT
from jaxlab import config
from jaxlab.data import SelectiveCopying
from jaxlab.mixers import MixerConfig, attention, delta_product, gla, mamba, retnet
from jaxlab.training import Run, TaskData, TrainConfig

TEST_ROWS = 512


def layers(width: int) -> dict[str, MixerConfig]:
    """The layers to compare, by label."""
    return {
        "Mamba": mamba.Config(width),
        "GLA": gla.Config(width),
        "Gated DeltaNet": delta_product.Config(width, n_householders=1, beta_max=1.0),
        "RetNet": retnet.Config(width),
        "attention": attention.Config(width),
    }


def with_layers(base: TrainConfig) -> dict[str, tuple[TrainConfig, ...]]:
    """The run with each of the layers; for Mamba its own config is kept."""
    mixers = layers(base.model.width) | {"Mamba": base.model.pattern[0]}
    return {
        label: (
            dataclasses.replace(
                base, model=dataclasses.replace(base.model, pattern=(mixer,))
            ),
        )
        for label, mixer in mixers.items()
    }


def cells(scale: str) -> dict[str, tuple[TrainConfig, ...]]:
    """configs/selective_copying.py with each of the layers."""
    base = config.load(ROOT / "configs" / "selective_copying.py")
    if scale == "gpu":
        data = TaskData(SelectiveCopying(length=4096))
        base = dataclasses.replace(base, data=data, batch_size=64, steps=100_000)
    return with_layers(base)


def score(run: Run) -> dict[str, Any]:
    """The shares of tokens copied right, and of rows without a mistake."""
    evaluated = scoring.task_scores(
        run, scoring.trained_task(run, SelectiveCopying), TEST_ROWS
    )
    return {"accuracy": evaluated["accuracy"], "rows": evaluated["row_accuracy"]}


def figure(results: dict) -> figures.Figure:
    """Draw a bar for each layer."""
    drawing, axes = figures.panels(1, width=6, height=3)
    labels = list(results["cells"])
    summaries = [results["cells"][label]["summary"]["accuracy"] for label in labels]
    figures.bars(axes[0, 0], labels, summaries, figures.COLOURS[0])
    axes[0, 0].set(xlabel="tokens copied right", xlim=(0, 1.02))
    return drawing
