"""MoM: the number of key-value pairs recalled, by the number of memories.

Papers: Du et al., MoM, arXiv 2502.13685, section 4 (recall-intensive tasks; more
memories recall more); the task is from Arora et al., Zoology, arXiv 2312.04927, section
4.
Expected: a recurrent layer recalls as many pairs as its state can store; MoM with more
memories recalls more than a Gated DeltaNet with the size of its active state and about
as much as one with the size of its whole state; attention recalls all.
Command: python scripts/experiment.py recall
Minutes on two cores: about 60.

Differs from the papers in: a synthetic task instead of FDA, SWDE and SQuAD; two layers
of width 64; a first stage with half as many pairs in rows of half the length. Every
cell has the same updates, batch and learning rate, which is not searched. Labels:
"MoM 4" has 4 routed memories, of which a token uses 2, and a shared one; "Gated
DeltaNet x3" has three times the state of one memory, as much as MoM 2, 4 and 8 use for
a token; x2, x3, x5 and x9 have as much as MoM 1, 2, 4 and 8 in all.
"""

import dataclasses
from typing import Any

from benchmarks.experiments import figures, scoring
from jaxlab.data import AssociativeRecall
from jaxlab.mixers import MixerConfig, attention, delta_product, gla, mamba, mom
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.training import Run, TaskData, TrainConfig

MEMORIES = (1, 2, 4, 8)
TEST_ROWS = 512
FRACTIONS = (8, 4, 2, 1)  # the trained number of pairs is divided by these


def mixers(width: int, n_heads: int, size: int) -> dict[str, MixerConfig]:
    """The layers to compare, by label; `size` is the head size of a memory.

    A memory has n_heads * size^2 floats. MoM with M memories has M + 1 of them and uses
    min(2, M) + 1 for a token; Gated DeltaNet with as many floats has larger heads, and
    GLA has the largest of these.
    """

    def gated_delta_net(memories: int) -> MixerConfig:
        larger = 2 * round(size * memories**0.5 / 2)
        return delta_product.Config(
            width, n_heads, larger, n_householders=1, beta_max=1.0
        )

    def mixture(memories: int) -> MixerConfig:
        return mom.Config(
            width,
            n_heads,
            size,
            size,
            n_memories=memories,
            top_k=min(2, memories),
        )

    largest = 2 * round(size * (max(MEMORIES) + 1) ** 0.5 / 2)
    layers: dict[str, MixerConfig] = {"attention": attention.Config(width, n_heads)}
    layers |= {f"MoM {m}": mixture(m) for m in MEMORIES}
    layers |= {
        f"Gated DeltaNet x{x}": gated_delta_net(x)
        for x in (1, *(m + 1 for m in MEMORIES))
    }
    layers["GLA"] = gla.Config(width, n_heads, key_size=largest, value_size=largest)
    layers["Mamba"] = mamba.Config(width)
    return layers


def train_config(
    task: Any, mixer: MixerConfig, scale: str, *, batch_size: int, steps: int
) -> TrainConfig:
    """The config of a cell; only the mixer differs between cells."""
    return TrainConfig(
        data=TaskData(task),
        model=LMConfig(
            vocab_size=-(-task.vocab_size // 8) * 8,
            width=mixer.width,
            n_layers=2,
            pattern=(mixer,),
        ),
        optimizer=AdamW(5e-3 if scale == "cpu" else 1e-3, WarmupCosine(50)),
        batch_size=batch_size,
        steps=steps,
    )


def cells(scale: str) -> dict[str, tuple[TrainConfig, ...]]:
    """One task with many layers; the first stage has half of the pairs."""
    if scale == "gpu":
        layers = mixers(128, 2, 32)
        stages: list[dict[str, Any]] = [
            dict(length=256, num_pairs=32, batch_size=256, steps=5000),
            dict(length=512, num_pairs=64, batch_size=256, steps=5000),
        ]
    else:
        layers = mixers(64, 2, 8)
        stages = [
            dict(length=32, num_pairs=8, batch_size=64, steps=800),
            dict(length=64, num_pairs=16, batch_size=32, steps=400),
        ]
    vocab_size = 64 if scale == "cpu" else 8192

    def stage(mixer: MixerConfig, length: int, num_pairs: int, **training):
        task = AssociativeRecall(length, vocab_size, num_pairs)
        return train_config(task, mixer, scale, **training)

    return {
        label: tuple(stage(mixer, **sizes) for sizes in stages)
        for label, mixer in layers.items()
    }


def score(run: Run) -> dict[str, Any]:
    """The share of right answers, by the number of pairs in a row."""
    trained, scores = scoring.trained_task(run, AssociativeRecall), {}
    for fraction in FRACTIONS:
        task = dataclasses.replace(trained, num_pairs=trained.num_pairs // fraction)
        evaluated = scoring.task_scores(run, task, TEST_ROWS)
        scores[f"{task.num_pairs} pairs"] = evaluated["accuracy"]
    return scores


def figure(results: dict) -> figures.Figure:
    """Plot accuracy over the number of pairs, with a panel for each family."""
    families = {"MoM": [], "Gated DeltaNet": [], "other layers": []}
    for label in results["cells"]:
        family = next((f for f in families if label.startswith(f)), "other layers")
        families[family].append(label)
    drawing, axes = figures.panels(len(families), width=3.6)
    for ax, (family, labels) in zip(axes[0], families.items(), strict=True):
        for colour, label in zip(figures.COLOURS, labels, strict=False):
            summary = results["cells"][label]["summary"]
            pairs = [int(name.split()[0]) for name in summary]
            figures.band(ax, pairs, summary.values(), label, color=colour)
        ax.set(title=family, xlabel="pairs a row", ylim=(-0.02, 1.02), xticks=pairs)
        ax.legend(fontsize=8, frameon=False)
    axes[0, 0].set_ylabel("queries answered right")
    return drawing
