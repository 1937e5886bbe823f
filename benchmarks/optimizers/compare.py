"""One harness for optimizers: the same parameters, batches and clock.

    python scripts/compare_optimizers.py autoencoder [--seeds 3] [--steps 500]

Each method's learning rate is the best of its list after a run of the first seed; the
other seeds get that one. Writes `results/optimizers_<problem>.json` and `.png`.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

from benchmarks.optimizers.problems import PROBLEMS, Problem
from benchmarks.record import record
from jaxlab import params
from jaxlab.optimizers import mkor, preconditioned

AT_ONCE = 10  # steps of a compiled program


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer, and the learning rates that it is tried with.

    Attributes:
        build: (problem, learning rate) to an optax transformation.
        rates: to choose from.
        taps: whether it takes statistics.
    """

    build: Callable[[Problem, float], optax.GradientTransformation]
    rates: tuple[float, ...]
    taps: bool = False


def with_mkor(base, **settings):
    """MKOR in front of an optimizer."""

    def build(problem: Problem, rate: float):
        return mkor(problem.specs, base(rate), biases=problem.biases, **settings)

    return build


def sgd(rate: float):
    return optax.sgd(rate, momentum=0.9)


METHODS = {
    "SGD": Method(lambda _, rate: sgd(rate), (1e-3, 3e-3, 1e-2)),
    "Adam": Method(lambda _, rate: optax.adam(rate), (1e-3, 2e-3, 4e-3)),
    "LAMB": Method(lambda _, rate: optax.lamb(rate), (3e-3, 1e-2, 3e-2)),
    "MKOR, SGD": Method(with_mkor(sgd), (3e-3, 1e-2, 3e-2), taps=True),
    "MKOR, Adam": Method(with_mkor(optax.adam), (1e-3, 3e-3, 1e-2), taps=True),
    "MKOR, LAMB": Method(with_mkor(optax.lamb), (3e-3, 1e-2, 3e-2), taps=True),
}


def main(problem: tyro.conf.Positional[str], steps: int = 500, seeds: int = 3) -> None:
    """Run, record and draw.

    Args:
        problem: one of `PROBLEMS`.
        steps: of a run, a multiple of 10.
        seeds: of each method at its best rate.

    Raises:
        ValueError: an unknown problem, or steps that are no multiple of 10.
    """
    if problem not in PROBLEMS:
        raise ValueError(f"problem={problem!r} is not one of {tuple(PROBLEMS)}.")
    if steps < 1 or steps % AT_ONCE:
        raise ValueError(f"steps={steps} must be a multiple of {AT_ONCE}.")
    opened, found = PROBLEMS[problem](), {}
    for name, method in METHODS.items():
        tried = {rate: run(opened, method, rate, 0, steps) for rate in method.rates}
        best = min(tried, key=lambda rate: finite(tried[rate]["loss"]))
        others = [run(opened, method, best, seed, steps) for seed in range(1, seeds)]
        found[name] = {
            "tried": {rate: each["loss"] for rate, each in tried.items()},
            "rate": best,
            "runs": [tried[best], *others],
        }
        print(name, best, *(each["loss"] for each in found[name]["runs"]), flush=True)
    path = record(f"optimizers_{problem}", steps=steps, methods=found)
    draw(found, path.with_suffix(".png"))
    print(f"Wrote {path}.")


def finite(loss: float | None) -> float:
    """A loss, the worst where it was not finite."""
    return math.inf if loss is None else loss


def draw(found: dict, path) -> None:
    """The batches' losses, smoothed, against steps and against seconds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, method) in enumerate(found.items()):
        for each in method["runs"]:
            smooth = [
                statistics.mean(map(finite, each["losses"][i : i + AT_ONCE]))
                for i in range(0, len(each["losses"]), AT_ONCE)
            ]
            steps = [AT_ONCE * (i + 1) for i in range(len(smooth))]
            seconds = [n * each["milliseconds_a_step"] / 1e3 for n in steps]
            how = {"color": f"C{number}", "linewidth": 1}
            left.plot(steps, smooth, **how)
            label = name if each is method["runs"][0] else None
            right.plot(seconds, smooth, label=label, **how)
    left.set(xlabel="steps", ylabel="loss of a batch", yscale="log", xlim=(0, None))
    right.set(xlabel="seconds", xlim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    figure.savefig(path)


def run(problem: Problem, method: Method, rate: float, seed: int, steps: int) -> dict:
    """One run: its losses, its seconds, and the figures of what it found."""
    optimizer = optax.with_extra_args_support(method.build(problem, rate))
    where = preconditioned(problem.specs)

    def step(carry, key):
        weights, state = carry
        x = problem.batch(key)
        tapped = params.tap(weights, where) if method.taps else weights
        loss, g = jax.value_and_grad(problem.loss)(tapped, x)
        g, taps = params.untap(g)
        extra = {"stats": taps} if method.taps else {}
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(g, state, weights, value=loss, **extra)
        return (optax.apply_updates(weights, updates), state), loss

    of_weights, of_batches = jax.random.split(jax.random.key(seed))
    weights = params.init(problem.specs, of_weights)
    carry = weights, optimizer.init(weights)
    keys = jax.random.split(of_batches, steps).reshape(-1, AT_ONCE)
    steps_at_once = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    compiled = steps_at_once.lower(carry, keys[0]).compile()
    losses, seconds = [], []
    for part in keys:
        start = time.perf_counter()
        carry, found = jax.block_until_ready(compiled(carry, part))
        seconds.append(time.perf_counter() - start)
        losses += [float(x) for x in found]
    times: Any = jnp.median(jnp.array(seconds)) / AT_ONCE
    return {
        "seed": seed,
        "losses": [round(x, 3) if math.isfinite(x) else None for x in losses],
        "milliseconds_a_step": round(1e3 * float(times), 3),
        **{
            name: round(x, 4) if math.isfinite(x) else None
            for name, x in problem.figures(carry[0]).items()
        },
    }
