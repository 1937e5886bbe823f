"""The loss curve of a run, drawn from its metrics."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxlab.training.metrics import read_metrics


def plot_losses(
    metrics_path: str | Path,
    png_path: str | Path,
    *,
    baselines: Mapping[str, float] | None = None,
    train: str = "loss",
    held_out: str = "held_out_loss",
    names: tuple[str, str] = ("train", "held-out"),
    ylabel: str = "loss (nats per token)",
    title: str = "",
) -> None:
    """Draw the loss against the step: training, its moving average, held-out points.

    Args:
        metrics_path: a metrics.jsonl.
        png_path: the picture to write.
        baselines: {label: loss}, each a dashed horizontal line, such as the entropy of
          a bigram model.
        train, held_out: names of the metrics; the second may be absent.
        names: what the picture calls them.
        ylabel: what the losses are measured in.
        title: a line above the picture.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the file holds no value of `train`, or a line is damaged.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "A loss curve needs matplotlib: pip install -e '.[plot]'."
        ) from error
    # The object interface draws without a display and leaves pyplot's state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(metrics_path, strict=True)
    steps, losses = _series(lines, train)
    if len(steps) == 0:
        raise ValueError(f"{metrics_path} holds no value of {train!r} to draw.")
    held_steps, held_losses = _series(lines, held_out)
    blue, orange, grey = "#1f5fa8", "#d9601a", "#6b6b6b"

    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False}):
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.spines["right"].set_visible(False)
        smooth = _moving_average(losses, len(losses) // 100)
        axes.plot(steps, losses, color=blue, alpha=0.25, linewidth=1)
        axes.plot(steps, smooth, color=blue, linewidth=2)
        labels = [(smooth[-1], f"{names[0]} {smooth[-1]:.2f}", blue)]
        if len(held_steps):
            axes.plot(
                held_steps,
                held_losses,
                "o-",
                color=orange,
                markersize=4,
                clip_on=False,
            )
            labels.append(
                (held_losses[-1], f"{names[1]} {held_losses[-1]:.2f}", orange)
            )
        for name, loss in (baselines or {}).items():
            axes.axhline(loss, color=grey, linestyle=(0, (5, 4)), linewidth=1)
            labels.append((loss, f"{name} {loss:.2f}", grey))
        levels = [*losses, *held_losses, *(baselines or {}).values()]
        margin = 0.05 * max(max(levels) - min(levels), 1e-3)
        bottom, top = min(levels) - margin, max(levels) + margin
        axes.set(
            xlabel="step",
            ylabel=ylabel,
            title=title,
            xlim=(min(0, steps[0]), max(steps[-1], *held_steps, 1)),
            ylim=(bottom, top),
        )
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        # Names stand beside the ends of their lines, in place of a legend.
        heights = _apart([y for y, _, _ in labels], 0.055 * (top - bottom), bottom, top)
        for height, (y, text, color) in zip(heights, labels, strict=True):
            axes.annotate(
                text,
                xy=(1, y),
                xytext=(1.03, height),
                xycoords=axes.get_yaxis_transform(),
                textcoords=axes.get_yaxis_transform(),
                color=color,
                verticalalignment="center",
                annotation_clip=False,
                arrowprops={
                    "arrowstyle": "-",
                    "color": color,
                    "linewidth": 0.7,
                    "relpos": (0, 0.5),
                    "shrinkA": 1,
                    "shrinkB": 4,
                },
            )
        figure.savefig(png_path)


def _series(lines: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(x["step"], x[name]) for x in lines if x.get(name) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, float), np.array(values, float)


def _moving_average(x: np.ndarray, reach: int) -> np.ndarray:
    """Mean over `reach` values to either side, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(x)])
    index = np.arange(len(x))
    first = np.maximum(index - reach, 0)
    last = np.minimum(index + reach + 1, len(x))
    return (sums[last] - sums[first]) / (last - first)


def _apart(heights: list[float], gap: float, low: float, high: float) -> np.ndarray:
    """Return the heights in [low, high] nearest to the given ones that are `gap` apart.

    Subtract i * gap from the i-th lowest. What remains must not decrease, and the
    nearest such numbers are an isotonic regression: neighbours that decrease are pooled
    into their mean.
    """
    order = np.argsort(heights, kind="stable")
    steps = gap * np.arange(len(heights))
    pools: list[list[float]] = []
    for y in np.array(heights)[order] - steps:
        pools.append([y])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    fitted = np.concatenate([np.full(len(pool), np.mean(pool)) for pool in pools])
    result = np.empty(len(heights))
    result[order] = np.clip(fitted, low, max(low, high - steps[-1])) + steps
    return result
