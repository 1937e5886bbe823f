"""Helpers to draw the figures of experiments without a display."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = (
    "#1f5fa8",
    "#d9601a",
    "#2f8f4e",
    "#b03a7c",
    "#8a6d1d",
    "#5a4fa2",
    "#3b9aa8",
    "#a8413b",
    "#6b6b6b",
    "#222222",
)


def panels(columns: int, rows: int = 1, width: float = 4.0, height: float = 3.4):
    """A figure and its axes, `[rows, columns]`."""
    figure = Figure(
        figsize=(width * columns, height * rows), dpi=150, layout="constrained"
    )
    FigureCanvasAgg(figure)  # needs neither a display nor pyplot
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def band(ax: Axes, x: Sequence, summaries: Iterable[dict], label: str, **style: Any):
    """Draw a line of means over the seeds, and a band from minimum to maximum."""
    points = [(at, s) for at, s in zip(x, summaries, strict=True) if s is not None]
    at = [p[0] for p in points]
    mean, low, high = (
        np.array([s[k] for _, s in points]) for k in ("mean", "min", "max")
    )
    (line,) = ax.plot(at, mean, label=label, **style)
    ax.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def bars(ax: Axes, labels: Sequence[str], summaries: Sequence[dict], colour: str):
    """Draw a horizontal bar per label: the mean, and a line from minimum to maximum."""
    y = np.arange(len(labels))[::-1]
    ax.barh(y, [s["mean"] for s in summaries], color=colour, alpha=0.75)
    for at, s in zip(y, summaries, strict=True):
        ax.plot([s["min"], s["max"]], [at, at], color="#222222", linewidth=1)
    ax.set_yticks(y, labels)
