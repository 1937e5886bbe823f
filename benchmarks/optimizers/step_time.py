"""The time of a step over the width of layers, for MKOR and K-FAC.

    python -m benchmarks.optimizers.step_time --peer-python ../kfac/bin/python

K-FAC is kfac-jax's, in a child process with its own environment (Python 3.11, kfac-jax
0.0.8, jax 0.9.1); without that Python it is left out. The problem is a perceptron of
square layers with few rows in a step, so that the optimizer dominates the time. Its
share is the time of the step less that of SGD's in the same environment. The part in
which the two methods differ is also timed alone: renewing the inverses of all factors
from given statistics, by rank-one updates or by inversion. All contestants at all
widths take turns. Writes `results/optimizers_step_time.json` and `.png`.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks.optimizers.compare import step_of
from benchmarks.optimizers.problems import BIAS, Problem, apply, perceptron
from benchmarks.record import record
from benchmarks.turns import Peer, alternate, power, quartiles
from jaxlab import params
from jaxlab.optimizers import mkor, preconditioned, scale_by_mkor

PEER = pathlib.Path(__file__).with_name("kfac_peer.py")
WIDTHS = (256, 512, 1024, 2048)
LAYERS, ROWS = 4, 64
TURN = 0.25  # least seconds for the steps of a turn
REST = 0.05  # seconds before a turn, for the previous contestant's threads to sleep

SGD = {"rate": 1e-3, "momentum": 0.9}  # also behind MKOR
ADAM = {"rate": 1e-3}
KFAC = {
    "rate": 0.1,
    "momentum": 0.9,
    "damping": 1.0,
    "cholesky": True,
    "estimation_mode": "ggn_curvature_prop",
    "curvature_ema": 0.95,
    "curvature_update_period": 1,
    "num_burnin_steps": 0,
}
"""The package's defaults, except for the first three, which it leaves to the user, for
the faster inversion, and for no burn-in. The damping is the curvature of half the
squared error."""

INVERSES = {"MKOR's factors": "MKOR", "K-FAC's inverses": "K-FAC"}
"""Contestants that only renew the factors by which the method multiplies gradients."""

RARELY = 5  # steps between K-FAC's inverses, the package's default

Run = Callable[[int], dict[str, float]]
"""Takes a number of steps; returns their "seconds", and the last "loss" in training."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A program that is timed at each width.

    Attributes:
        open: function from a width to a `Run`.
        period: steps after which its work repeats.
        baseline: the contestant whose time is subtracted to get the optimizer's share.
        beside: the contestant by whose time its own is divided.
    """

    open: Callable[[int], Run]
    period: int = 1
    baseline: str | None = None
    beside: str | None = None


def main(peer_python: str | None = None, turns: int = 9) -> None:
    """Measure, record and draw.

    Args:
        peer_python: a Python with kfac-jax.
        turns: repetitions of each measurement.
    """
    contestants, versions = ours(), {}
    if peer_python is not None:
        peer = Peer(peer_python, PEER)
        contestants, versions = contestants | theirs(peer), peer.ask()
    milliseconds, losses = measure(contestants, WIDTHS, turns)
    figures = summary(contestants, WIDTHS, milliseconds)
    path = record(
        "optimizers_step_time",
        versions=versions,
        turns=turns,
        widths=WIDTHS,
        layers=LAYERS,
        rows=ROWS,
        dtype="float32, MKOR's factors bfloat16",
        settings={"SGD": SGD, "Adam": ADAM, "MKOR": SGD, "K-FAC": KFAC},
        losses=losses,
        contestants=figures,
    )
    draw(figures, WIDTHS, path.with_suffix(".png"))
    print(f"Wrote {path}.")


# The contestants ----------------------------------------------------------------------


def ours() -> dict[str, Contestant]:
    """The contestants from this library and optax."""

    sgd, adam = optax.sgd(SGD["rate"], SGD["momentum"]), optax.adam(ADAM["rate"])

    def with_mkor(width: int) -> Run:
        opened = problem(width)
        optimizer = mkor(
            SGD["rate"],
            base=lambda rate: optax.sgd(rate, SGD["momentum"]),
            biases=opened.biases,
            specs=opened.specs,
        )
        return training_run(opened, optimizer, taps=True)

    return {
        "SGD": Contestant(lambda width: training_run(problem(width), sgd)),
        "Adam": Contestant(lambda width: training_run(problem(width), adam)),
        "MKOR": Contestant(with_mkor, baseline="SGD"),
        "MKOR's factors": Contestant(lambda d: repeated(*factors_step(problem(d)))),
    }


def problem(width: int) -> Problem:
    """Fit another network's outputs for a batch of noise by half the squared error."""
    specs = perceptron((width,) * (LAYERS + 1))
    teacher_key, x_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, (ROWS, width))
    y = apply(params.init(specs, teacher_key), x)

    def loss(weights, batch):
        x, y = batch
        return 0.5 * jnp.sum((apply(weights, x) - y) ** 2) / len(x)

    def figures(weights):
        return {"loss": float(loss(weights, (x, y)))}

    return Problem(specs, loss, lambda key: (x, y), figures, biases=BIAS)


def training_run(
    problem: Problem, optimizer: optax.GradientTransformation, taps: bool = False
) -> Run:
    """A `Run` of training steps."""
    step = jax.jit(step_of(problem, optimizer, taps), donate_argnums=0)
    weights = params.init(problem.specs, jax.random.key(1))
    batch = problem.batch(jax.random.key(2))
    return repeated(step, (weights, optimizer.init(weights)), batch)


def factors_step(problem: Problem) -> tuple[Any, Any, Any]:
    """MKOR's update of its factors, its state, and the gradient and taps to give it."""
    optimizer = scale_by_mkor(problem.specs, biases=problem.biases)
    weights = params.init(problem.specs, jax.random.key(1))
    tapped = params.tap(weights, preconditioned(problem.specs))
    batch = problem.batch(jax.random.key(2))
    gradient, taps = params.untap(jax.jit(jax.grad(problem.loss))(tapped, batch))

    def step(state, argument):  # XLA drops the unused updates of the weights
        gradient, taps = argument
        return optimizer.update(gradient, state, stats=taps)[1], None

    step = jax.jit(step, donate_argnums=0)
    return step, optimizer.init(weights), (gradient, taps)


def repeated(step: Callable, carry: Any, argument: Any) -> Run:
    """A `Run` of a step from (carry, argument) to (carry, loss or None)."""

    def run(steps: int) -> dict[str, float]:
        nonlocal carry
        start = time.perf_counter()
        for _ in range(steps):
            carry, loss = step(carry, argument)
        jax.block_until_ready(carry)
        result = {"seconds": time.perf_counter() - start}
        return result if loss is None else result | {"loss": float(loss)}

    return run


def theirs(peer: Peer) -> dict[str, Contestant]:
    """The contestants in kfac-jax's environment."""

    def opened(contestant: str, **settings: Any) -> Callable[[int], Run]:
        def at(width: int) -> Run:
            name = f"{contestant} {settings} {width}"
            arguments = {"sizes": (width, LAYERS, ROWS), **settings}
            peer.ask(open=name, contestant=contestant, settings=arguments)
            return lambda steps: peer.ask(run=name, steps=steps)

        return at

    def kfac(period: int) -> Contestant:
        run = opened("K-FAC", **KFAC, inverse_update_period=period)
        return Contestant(run, period, baseline="SGD beside K-FAC", beside="MKOR")

    return {
        "SGD beside K-FAC": Contestant(opened("SGD", **SGD), beside="SGD"),
        "K-FAC": kfac(1),
        f"K-FAC, every {RARELY} steps": kfac(RARELY),
        "K-FAC's inverses": Contestant(
            opened("inverses", **KFAC), beside="MKOR's factors"
        ),
    }


# Times --------------------------------------------------------------------------------


class Paced:
    """The seconds per step of turns that are long enough to be timed."""

    def __init__(self, run: Run, period: int):
        self.first = run(1)  # compiles
        seconds = run(period)["seconds"]
        self.run, self.steps = run, period * math.ceil(TURN / seconds)
        self.made = 1 + period

    def __call__(self) -> float:
        time.sleep(REST)
        self.last = self.run(self.steps)
        self.made += self.steps
        return self.last["seconds"] / self.steps

    def losses(self) -> dict[str, float]:
        """The first and last loss by step number; empty for one that does not train."""
        results = {1: self.first, self.made: self.last}
        return {
            f"step {n}": float(f"{x['loss']:.4g}")
            for n, x in results.items()
            if "loss" in x
        }


def measure(
    contestants: dict[str, Contestant], widths: Sequence[int], turns: int
) -> tuple[dict[str, np.ndarray], dict[str, list]]:
    """Milliseconds per step ``[width, turn]``, and losses at each width, by name."""
    paced = {
        f"{name} {width}": Paced(contestant.open(width), contestant.period)
        for name, contestant in contestants.items()
        for width in widths
    }
    seconds = alternate(dict(paced), turns)
    milliseconds = {
        name: 1e3 * np.array([seconds[f"{name} {width}"] for width in widths])
        for name in contestants
    }
    losses = {
        name: [paced[f"{name} {width}"].losses() for width in widths]
        for name in contestants
        if name not in INVERSES
    }
    return milliseconds, losses


def summary(
    contestants: dict[str, Contestant],
    widths: Sequence[int],
    milliseconds: dict[str, np.ndarray],
) -> dict[str, dict]:
    """Medians and quartiles of times and ratios, and exponents of the width."""
    figures = {}
    for name, contestant in contestants.items():
        times = milliseconds[name]
        figures[name] = described(widths, times)
        if contestant.baseline is not None:
            less = times - milliseconds[contestant.baseline]
            figures[name]["optimizer"] = described(widths, less)
        if contestant.beside is not None:
            ratios = times / milliseconds[contestant.beside]
            figures[name]["beside"] = contestant.beside
            figures[name]["ratio"] = [quartiles(x) for x in ratios]
    return figures


def described(widths: Sequence[int], times: np.ndarray) -> dict:
    """Quartiles of times ``[width, turn]``, and exponents of all and larger widths."""
    half = len(widths) // 2
    return {
        "milliseconds": [quartiles(x) for x in times],
        "exponent": _power(widths, times),
        "exponent_of_larger": _power(widths[half:], times[half:]),
    }


def _power(widths: Sequence[int], times: np.ndarray) -> float | None:
    """The exponent of the medians; None if one of them is not above 0."""
    medians = np.median(times, axis=1)
    return round(float(power(widths, medians)), 3) if medians.min() > 0 else None


def draw(figures: dict[str, dict], widths: Sequence[int], path: pathlib.Path) -> None:
    """Plot times over the width: whole steps, optimizers' shares, and new inverses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = {name: x for name, x in figures.items() if name not in INVERSES}
    panels = {
        "a step": steps,
        "of it the optimizer": {
            name: x["optimizer"] for name, x in steps.items() if "optimizer" in x
        },
        "of it new inverses": {
            method: figures[name]
            for name, method in INVERSES.items()
            if name in figures
        },
    }
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    colours = {name: f"C{i}" for i, name in enumerate(steps)}
    drawn = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, lines) in zip(drawn, panels.items(), strict=True):
        for name, x in lines.items():
            times = [each["median"] for each in x["milliseconds"]]
            p = x["exponent_of_larger"]
            style = {"color": colours[name], "marker": "o", "markersize": 3}
            label = name if p is None else f"{name}: {p:.2f}"
            axes.loglog(widths, times, linewidth=1, label=label, **style)
        axes.set(title=title, xlabel="width d")
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        small = {"fontsize": 7, "title_fontsize": 7, "loc": "upper left"}
        half = widths[len(widths) // 2]
        axes.legend(title=f"~ d^p from d = {half}, p =", frameon=False, **small)
    low, high = drawn[0].get_ylim()
    drawn[0].set(ylabel="milliseconds", ylim=(low, 30 * high))  # legends above lines
    figure.savefig(path)


if __name__ == "__main__":
    tyro.cli(main)
