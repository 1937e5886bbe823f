"""DeltaProduct: the groups tracked, by Householder steps per token and range of beta.

Paper: Siems et al., DeltaProduct, arXiv 2502.10297, section 5.1 (figures of accuracy
over length for S3, S4, A5, S5; parity is in its appendix).
Expected: one layer with beta in [0, 2] tracks parity with 1 step, S3, S4 and A5 with 2
and S5 with 4, also on longer words; with beta in [0, 1] it tracks none of them. At this
size A5 and S5 need more samples than this training has, and S4 four steps per token.
Command: python scripts/experiment.py state_tracking
Minutes on two cores: about 115.

Differs from the paper in: words of 32 (tested to 128) instead of 128 (to 512), width 64
instead of 128, and a curriculum of words of 4, 8 and 32 elements, which needs fewer
samples. Every cell has the same updates, learning rate and batch, and none is stopped
early. As in the paper there is no convolution, forget gate or output gate.
"""

import dataclasses
from typing import Any

import numpy as np

from benchmarks.experiments import figures, scoring
from benchmarks.record import ROOT
from jaxlab import config
from jaxlab.data import GroupWordProblem
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.training import Run, TaskData, TrainConfig

GROUPS = ("parity", "S3", "S4", "A5", "S5")
STEPS_A_TOKEN = (1, 2, 3, 4)
BETAS = (1.0, 2.0)
TIMES = (1, 2, 4)  # multiples of the trained length
TEST_ROWS = 1024
BIN = 4  # positions averaged in each point of the figure


def cells(scale: str) -> dict[str, tuple[TrainConfig, ...]]:
    """Groups x steps per token x ranges of beta, from configs/state_tracking.py."""
    base = config.load(ROOT / "configs" / "state_tracking.py")
    mixer = dataclasses.replace(base.model.pattern[0], key_size=16)
    width, hidden = 64, None
    stages: list[dict[str, Any]] = [
        dict(length=5, batch_size=128, steps=1600),
        dict(length=9, batch_size=64, steps=400),
        dict(length=33, batch_size=32, steps=500),
    ]
    if scale == "cpu":
        adamw = dataclasses.replace(base.optimizer, learning_rate=1e-2)
    else:
        width, hidden = 128, 512
        mixer = dataclasses.replace(mixer, width=128, n_heads=8, key_size=32)
        adamw = AdamW(1e-3, WarmupCosine(0, end=0.0), weight_decay=1e-6, b2=0.999)
        stages = [dict(length=129, batch_size=2048, steps=5000)]

    def stage(group: str, n: int, beta_max: float, length: int, **training):
        task = GroupWordProblem(group, length)
        model = dataclasses.replace(
            base.model,
            vocab_size=-(-task.vocab_size // 8) * 8,
            width=width,
            mlp_hidden=hidden,
            pattern=(dataclasses.replace(mixer, n_householders=n, beta_max=beta_max),),
        )
        return dataclasses.replace(
            base, data=TaskData(task), model=model, optimizer=adamw, **training
        )

    return {
        label(group, n, beta_max): tuple(
            stage(group, n, beta_max, **sizes) for sizes in stages
        )
        for group in GROUPS
        for n in STEPS_A_TOKEN
        for beta_max in BETAS
    }


def label(group: str, n: int, beta_max: float) -> str:
    return f"{group} n={n} beta={beta_max:g}"


def score(run: Run) -> dict[str, Any]:
    """Accuracy at the last element of words of each length, and by position."""
    trained, scores = scoring.trained_task(run, GroupWordProblem), {}
    for times in TIMES:
        task = dataclasses.replace(trained, length=times * (trained.length - 1) + 1)
        evaluated = scoring.task_scores(run, task, TEST_ROWS, batch_size=128 // times)
        by_position = evaluated["accuracy_by_position"][1:]  # position 0 has no target
        scores[f"at {times}x"] = float(by_position[-1])
        scores[f"words {times}x"] = evaluated["row_accuracy"]
    means = by_position[: len(by_position) // BIN * BIN].reshape(-1, BIN).mean(1)
    return scores | {"by_position": scoring.listed(means)}


def figure(results: dict) -> figures.Figure:
    """Plot accuracy by position; the best seed at the trained length is opaque."""
    trained = next(iter(results["cells"].values()))["config"]["data"]["task"]["length"]
    drawing, axes = figures.panels(len(GROUPS), width=3.2)
    for ax, group in zip(axes[0], GROUPS, strict=True):
        for colour, n in zip(figures.COLOURS, STEPS_A_TOKEN, strict=False):
            for beta_max, dashes in zip(BETAS, (":", "-"), strict=True):
                cell = results["cells"].get(label(group, n, beta_max))
                if cell is None:
                    continue
                curves = [run["scores"]["by_position"] for run in cell["runs"]]
                best = int(np.argmax([run["scores"]["at 1x"] for run in cell["runs"]]))
                for i, curve in enumerate(curves):
                    x = BIN * (np.arange(len(curve)) + 0.5)
                    style = dict(color=colour, linestyle=dashes)
                    plural = "s" if n > 1 else ""
                    name = f"{n} step{plural}, beta ≤ {beta_max:g}"
                    name = name if i == best else None
                    ax.plot(
                        x, curve, alpha=1 if i == best else 0.25, label=name, **style
                    )
        ax.axvline(
            trained - 1,
            label="trained length",
            color="#6b6b6b",
            linewidth=1,
            linestyle=(0, (5, 4)),
        )
        ax.set(title=group, xlabel="element of the word", ylim=(-0.02, 1.02))
    axes[0, 0].set_ylabel("accuracy, best of the seeds")
    lines = {line.get_label(): line for ax in axes.flat for line in ax.get_lines()}
    named = {name: lines[name] for name in sorted(lines) if not name.startswith("_")}
    drawing.legend(named.values(), named.keys(), loc="outside lower center", ncols=4)
    return drawing
