"""What a run reports: metric files, a progress line, its speed, and a loss curve."""

import errno
import functools
import json
import logging
import math
import os
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

log = logging.getLogger(__name__)

# Dense bfloat16 operations per second of one JAX device, by the start of device_kind;
# longer names first where one starts another.
# TPU: "peak compute per chip" in docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}.
# A TPU7x chip is two devices; the others are one.
# NVIDIA: data sheets of the A100, H100, H200 and DGX B200/GB200, without sparsity.
PEAK_FLOPS = {
    "TPU v4 lite": 137e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6": 918e12,  # v6e
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


def peak_flops(device: Any) -> float | None:
    """The most floating-point operations per second that one device can do.

    Args:
        device: one of jax.devices(). TPU and GPU peaks are dense bfloat16 from a table.
          A CPU's is measured with a float32 matrix product and shared out among the
          local CPU devices, all of which run on the same cores.

    Returns:
        Operations per second, or None for a kind of device that is not in the table.
    """
    if device.platform == "cpu":
        return _measured_cpu_flops() / len(jax.local_devices(backend="cpu"))
    for kind, flops in PEAK_FLOPS.items():
        if device.device_kind.startswith(kind):
            return flops
    return None


@functools.cache
def _measured_cpu_flops() -> float:
    n = 1024
    x = jax.device_put(np.ones((n, n), np.float32), jax.local_devices(backend="cpu")[0])
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds)


class MetricWriter:
    """Writes metrics to `metrics.jsonl` and to TensorBoard files, on process 0.

    A line of metrics.jsonl is {"step": 20, "time": seconds since 1970, name: value}; a
    value that is not finite is null. A line cut short by a kill is dropped when the
    next run opens the file.

    Args:
        directory: made if missing; `tensorboard --logdir` takes it.
    """

    def __init__(self, directory: str | Path):
        self._file: Any = None
        self._events: Any = None
        if jax.process_index() != 0:
            return
        self.path = Path(directory) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()
        try:
            from tensorboardX import SummaryWriter

            self._new_events = functools.partial(SummaryWriter, str(directory))
        except ImportError:
            self._new_events = None
            print(
                "No TensorBoard files are written, because tensorboardX is missing: "
                "pip install -e '.[plot]'. metrics.jsonl holds every metric."
            )

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the metrics of one step; a number or a scalar array each.

        On a full disk the line is left out with a warning: a run is worth more than
        its record.
        """
        if self._file is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = json.dumps({"step": step, "time": time.time(), **finite}) + "\n"
        size = os.path.getsize(self.path)
        try:
            if self._file.write(line.encode()) != len(line.encode()):
                raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
            if self._new_events is not None:
                self._events = self._events or self._new_events()
                for name, value in values.items():
                    self._events.add_scalar(name, value, step)
        except OSError as error:
            if os.path.getsize(self.path) < size + len(line):
                os.truncate(self.path, size)  # no half of a line
            log.warning("The metrics of step %s are not recorded: %s", step, error)

    def truncate_after(self, step: int) -> None:
        """Forget later steps, which a run continued from `step` writes again."""
        if self._file is None:
            return
        self.close()
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self._open()
        if self._new_events is not None:  # TensorBoard hides what is purged
            self._events = self._new_events(purge_step=step + 1)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def _open(self) -> None:
        if self.path.exists():
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(self.path, content.rfind(b"\n") + 1)
        self._file = open(self.path, "ab", buffering=0)


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a metrics.jsonl, without a last one that was cut short."""
    lines = Path(path).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Progress:
    """The state of a run in one line: `step 120/600  loss 2.134  18.2k tok/s ...`.

    On a terminal the line is rewritten; elsewhere one is printed every `interval`
    seconds and at the end. Only process 0 prints.

    Args:
        total_steps: where the run ends.
        figure: the name of what is shown of each step.
        flops_per_token: forward and backward, of the model (no recomputation).
        peak_flops: sum over all devices; without it or flops_per_token the model-FLOP
          utilisation (MFU) is left out.
        interval: seconds between lines that are not rewritten.
        window: updates that the speed is taken over.
        stream: by default sys.stdout.
        clock: seconds from any origin.
    """

    def __init__(
        self,
        total_steps: int,
        figure: str = "loss",
        *,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        interval: float = 10.0,
        window: int = 20,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps = total_steps
        self.figure = figure
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.interval = interval
        self.stream = stream or sys.stdout
        self.clock = clock
        self._rewrites = self.stream.isatty()
        self._silent = jax.process_index() != 0
        self._recent = deque(maxlen=window + 1)  # (seconds, step, tokens)
        self._printed = -math.inf
        self._line = ""

    def update(self, step: int, value: float, tokens: int | None = None) -> None:
        """Show the figure of a step; the first call starts the clock.

        Args:
            step: updates made.
            value: the figure of the last one.
            tokens: read by all steps so far, over all devices; None shows the seconds
                of a step in place of a speed in tokens.
        """
        now = self.clock()
        self._recent.append((now, step, tokens))
        self._line = "  ".join([f"step {step}/{self.total_steps}", *self._parts(value)])
        if self._silent:
            return
        if self._rewrites:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r{self._line[:width]}\x1b[K")
        elif now - self._printed >= self.interval or step >= self.total_steps:
            self.stream.write(self._line + "\n")
            self._printed = now
        self.stream.flush()

    def message(self, text: str) -> None:
        """Print a line of its own; a rewritten line continues below it."""
        if self._silent:
            return
        if self._rewrites:
            text = f"\r{text}\x1b[K\n{self._line}"
        else:
            text += "\n"
        self.stream.write(text)
        self.stream.flush()

    def close(self) -> None:
        """End a rewritten line, so that what follows starts on a new one."""
        if self._rewrites and self._line and not self._silent:
            self.stream.write("\n")
            self.stream.flush()
        self._line = ""

    def _parts(self, value: float) -> list[str]:
        parts = [f"{self.figure} {float(value):.3f}"]
        start, first, before = self._recent[0]
        end, last, tokens = self._recent[-1]
        if end <= start or last <= first:
            return parts
        steps_per_second = (last - first) / (end - start)
        if tokens is None or before is None:
            parts.append(f"{1 / steps_per_second:.2g} s/step")
        else:
            tokens_per_second = (tokens - before) / (end - start)
            parts.append(f"{_short(tokens_per_second)} tok/s")
            if self.flops_per_token is not None and self.peak_flops is not None:
                mfu = tokens_per_second * self.flops_per_token / self.peak_flops
                parts.append(f"MFU {mfu:.0%}" if mfu >= 0.1 else f"MFU {mfu:.1%}")
        left = (self.total_steps - last) / steps_per_second
        parts.append(f"{_duration(left)} left")
        return parts


def _short(x: float) -> str:
    """Three digits and a unit: 950, 18.2k, 1.25M."""
    for unit in ("", "k", "M", "G"):
        if x < 999.5 or unit == "G":
            digits = 0 if unit == "" or x >= 99.95 else 1 if x >= 9.995 else 2
            return f"{x:.{digits}f}{unit}"
        x /= 1000
    raise AssertionError("unreachable")


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


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
        ValueError: if the file holds no value of `train`.
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

    lines = read_metrics(metrics_path)
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
                *(held_steps, held_losses, "o-"),
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
    """The heights in [low, high] nearest to the given ones that are `gap` apart.

    With i * gap taken from the i-th lowest, that is a least-squares fit of numbers
    that do not decrease: neighbours that do are pooled into their mean.
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
