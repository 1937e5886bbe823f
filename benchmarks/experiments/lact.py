"""LaCT: loss by position, and by chunk, state and rule of the fast weights.

Paper: Zhang et al., Test-Time Training Done Right, arXiv 2505.23884, section 5.2
(loss by position against attention and recurrent layers) and its ablations of the
state's size and of the update.
Expected: the loss of sliding-window attention is flat beyond the reach of the layers'
windows; with fast weights it keeps falling, and more so with a larger state; Muon is no
worse than momentum, which is better than gradient descent. (LaCT alone means Muon with
momentum.)
Command: python scripts/experiment.py lact
Minutes on two cores: about 40.

Differs from the paper in: bytes of Python source instead of text tokens, rows of 512
instead of 32768, two layers. The window of a LaCT layer is its chunk, and every LaCT is
compared with a sliding-window attention of the same window, width and depth. Every cell
has the same updates, learning rate and batch.
"""

from typing import Any

import jax

from benchmarks.experiments import figures, scoring
from jaxlab.evaluation import evaluate, loss_by_position
from jaxlab.mixers import MixerConfig, attention, lact
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupCosine
from jaxlab.training import Run, TextData, TrainConfig
from jaxlab.training.source import open_source

CHUNKS = (32, 64, 128)
CHUNK = 64  # in the other comparisons
BINS = 16


def mixers(width: int, n_heads: int, n_fast_heads: int, chunks, chunk: int):
    """The layers to compare, by label."""

    def fast(chunk_size: int = chunk, **changes) -> MixerConfig:
        sizes: dict[str, Any] = dict(n_fast_heads=n_fast_heads, inter_multi=1)
        sizes |= dict(chunk_size=chunk_size, window=chunk_size) | changes
        return lact.Config(width, n_heads, **sizes)

    rate = 1e-3 * 2048 / chunk  # updates are sums over a chunk, 2048 in the paper
    layers: dict[str, MixerConfig] = {"attention": attention.Config(width, n_heads)}
    layers |= {
        f"window {size}": attention.Config(width, n_heads, window=size)
        for size in chunks
    }
    layers |= {f"LaCT chunk {size}": fast(size) for size in chunks}
    layers |= {
        "LaCT Muon, no momentum": fast(momentum=False),
        "LaCT momentum": fast(optimizer="gradient_descent", base_lr=rate),
        "LaCT gradient descent": fast(
            optimizer="gradient_descent", momentum=False, base_lr=rate
        ),
        "LaCT state x2": fast(inter_multi=2),
        "LaCT state x4": fast(inter_multi=4),
        "LaCT state x1/2": fast(n_fast_heads=2 * n_fast_heads),
    }
    return layers


def cells(scale: str) -> dict[str, tuple[TrainConfig, ...]]:
    """One corpus with many layers."""
    if scale == "gpu":
        layers = mixers(768, 12, 4, (256, 512, 1024, 2048), 1024)
        data, depth, batch_size, steps = (
            TextData(sequence_length=16_384),
            12,
            16,
            10_000,
        )
    else:
        layers = mixers(96, 4, 2, CHUNKS, CHUNK)
        data = TextData(sequence_length=512, eval_tokens=65_536)
        depth, batch_size, steps = 2, 4, 300
    return {
        label: (
            TrainConfig(
                data=data,
                model=LMConfig(width=mixer.width, n_layers=depth, pattern=(mixer,)),
                optimizer=AdamW(4e-3 if scale == "cpu" else 1e-3, WarmupCosine(50)),
                batch_size=batch_size,
                steps=steps,
            ),
        )
        for label, mixer in layers.items()
    }


def edges(length: int) -> list[int]:
    """The edges of bins of positions of equal width."""
    return [i * length // BINS for i in range(BINS + 1)]


def score(run: Run) -> dict[str, Any]:
    """Bits per byte of held-out files, in all and by position in the document.

    These files were not used for training, nor to choose anything.
    """
    data = run.config.data
    assert isinstance(data, TextData)
    source = open_source(data, run.config.batch_size, run.config.seed, resumes=True)
    model = run.config.model
    with jax.set_mesh(run.mesh):
        evaluated = evaluate(run.params, model, source.heldout(), run.mesh)
        by_position = loss_by_position(
            run.params,
            model,
            source.heldout(),
            run.mesh,
            edges=edges(data.sequence_length),
        )
    bits = by_position["bits_per_byte"]
    return {
        "bits per byte": evaluated["bits_per_byte"],
        f"first 1/{BINS} of the positions": float(bits[0]),
        f"last 1/{BINS}": float(bits[-1]),
        "by position": scoring.listed(bits),
    }


def figure(results: dict) -> figures.Figure:
    """Plot bits per byte over the position, with a panel for each comparison."""
    cells = results["cells"]
    first = next(iter(cells.values()))["config"]
    bounds = edges(first["data"]["sequence_length"])
    middles = [(a + b) / 2 for a, b in zip(bounds, bounds[1:], strict=False)]
    chunk = CHUNK if results["scale"] == "cpu" else 1024
    pair = [f"window {chunk}", f"LaCT chunk {chunk}"]
    comparisons = {
        "against attention": ["attention", *pair],
        "chunk (dashed: window alone)": [
            name for name in cells if name.startswith(("window", "LaCT chunk"))
        ],
        "update": [
            pair[1],
            "LaCT Muon, no momentum",
            "LaCT momentum",
            "LaCT gradient descent",
        ],
        "state": ["LaCT state x1/2", pair[1], "LaCT state x2", "LaCT state x4"],
    }
    drawing, axes = figures.panels(len(comparisons), width=3.6, height=4.2)
    for ax, (title, labels) in zip(axes[0], comparisons.items(), strict=True):
        for i, name in enumerate(n for n in labels if n in cells):
            summary = cells[name]["summary"]["by position"]
            style = dict(linestyle="--" if name.startswith("window") else "-")
            style["color"] = figures.COLOURS[i % len(CHUNKS) if len(labels) > 4 else i]
            figures.band(ax, middles, summary, name, **style)
        ax.set(title=title, xlabel="position in the document")
        ax.legend(fontsize=7, frameon=False)
    axes[0, 0].set_ylabel("bits per byte")
    return drawing
