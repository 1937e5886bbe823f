"""One harness for optimizers: the same parameters, batches and clock.

    python scripts/compare_optimizers.py autoencoder [--seeds 3] [--steps 500]

Each method's learning rate is walked to on a grid by runs of the first seed, until no
neighbour ends better; the other seeds get that one. Then all methods take turns under
one clock. Writes `results/optimizers_<problem>.json` and `.png`.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks.optimizers.problems import PROBLEMS, Problem
from benchmarks.record import RESULTS, commit, record
from benchmarks.turns import alternate, quartiles
from jaxlab import optimizers, params
from jaxlab.optimizers import MKOR, Switch, left_at, preconditioned

AT_ONCE = 10  # steps of a compiled program, and between looks at held-out data
TURNS = 9  # of each method under the clock
GRID = tuple(float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3))


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer, and the learning rate of the grid that it is tried with first.

    Attributes:
        settings: (problem, learning rate) to what builds the transformation; traced.
        start: of the walk.
        taps: whether it takes statistics.
        switches: whether it leaves its factors behind at some step.
    """

    settings: Callable[[Problem, Any], Any]
    start: float
    taps: bool = False
    switches: bool = False


def plain(settings: Any, **others):
    """Settings of an optimizer of the library, without weight decay."""

    def at(problem: Problem, rate):
        return settings(
            learning_rate=rate,
            schedule=problem.schedule,
            weight_decay=0.0,
            clip=problem.clip,
            **others,
        )

    return at


def with_mkor(base, switch: Switch | None = None):
    """Settings of MKOR in front of an optimizer; with a switch, MKOR-H."""

    def at(problem: Problem, rate):
        return MKOR(base=base(problem, rate), biases=problem.biases, switch=switch)

    return at


sgd = plain(optimizers.SGD)
adam = plain(optimizers.AdamW, b2=0.999)
lamb = plain(optimizers.LAMB)

METHODS = {
    "SGD": Method(sgd, 3e-3),
    "Adam": Method(adam, 3e-3),
    "LAMB": Method(lamb, 3e-3),
    "Muon": Method(plain(optimizers.Muon), 3e-3),
    "SOAP": Method(plain(optimizers.SOAP), 3e-3),
    "Shampoo": Method(plain(optimizers.Shampoo), 3e-3),
    "FRUGAL": Method(plain(optimizers.FRUGAL), 1e-3),
    "AdaGrad": Method(plain(optimizers.AdAdaGrad), 1e-2),
    "MKOR, SGD": Method(with_mkor(sgd), 1e-2, taps=True),
    "MKOR, Adam": Method(with_mkor(adam), 3e-3, taps=True),
    "MKOR, LAMB": Method(with_mkor(lamb), 1e-2, taps=True),
    "MKOR-H, LAMB": Method(with_mkor(lamb, Switch()), 1e-2, taps=True, switches=True),
}


def main(
    problem: tyro.conf.Positional[str],
    steps: int = 500,
    seeds: int = 3,
    methods: tuple[str, ...] = tuple(METHODS),
    workers: int = 2,
) -> None:
    """Run, record and draw. What `kfac` has added to the file goes; add it again.

    Args:
        problem: one of `PROBLEMS`.
        steps: of a run, a multiple of 10.
        seeds: of each method at its best rate.
        methods: to run anew; of others, the runs that are recorded are kept. None: only
            the clock is read anew.
        workers: processes, each on a core of its own.

    Raises:
        ValueError: an unknown problem or method, steps that are no multiple of 10, no
            recorded runs to keep, or some of other steps or seeds.
    """
    if problem not in PROBLEMS:
        raise ValueError(f"problem={problem!r} is not one of {tuple(PROBLEMS)}.")
    if steps < 1 or steps % AT_ONCE:
        raise ValueError(f"steps={steps} must be a multiple of {AT_ONCE}.")
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"methods={unknown} are not among {tuple(METHODS)}.")
    all_anew = set(methods) == set(METHODS)
    found = {} if all_anew else _recorded(problem, steps, seeds)
    PROBLEMS[problem]()  # what it reads is there before the workers want it
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _take_a_core, (_cores(),)
    ) as pool:
        waited = {
            pool.submit(study, problem, name, steps, seeds): name for name in methods
        }
        for done in concurrent.futures.as_completed(waited):
            name = waited[done]
            found[name] = done.result()
            losses = [each["loss"] for each in found[name]["runs"]]
            print(name, found[name]["rate"], *losses, flush=True)
    found = {name: found[name] for name in METHODS if name in found}
    path = record(
        f"optimizers_{problem}",
        steps=steps,
        every=AT_ONCE,
        methods=found,
        clock=clock(PROBLEMS[problem](), list(found), steps),
    )
    draw(json.loads(path.read_text()), path.with_suffix(".png"))
    print(f"Wrote {path}.")


def _recorded(problem: str, steps: int, seeds: int) -> dict:
    path = RESULTS / f"optimizers_{problem}.json"
    if not path.exists():
        raise ValueError(f"There is no {path.name} to keep runs of; run all methods.")
    data = json.loads(path.read_text())
    kept = {len(method["runs"]) for method in data["methods"].values()}
    if data["steps"] != steps or kept != {seeds}:
        raise ValueError(
            f"steps={steps} and seeds={seeds}, but {path.name} has runs of "
            f"{data['steps']} steps by {kept} seeds; give its own, or run all methods."
        )
    return data["methods"]


def _cores():
    cores = multiprocessing.get_context("spawn").SimpleQueue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    return cores


def _take_a_core(cores) -> None:
    if not cores.empty():
        os.sched_setaffinity(0, {cores.get()})


opened = functools.cache(lambda problem: PROBLEMS[problem]())


def study(problem: str, name: str, steps: int, seeds: int) -> dict:
    """A method's best rate, and its runs there."""
    run = Runs(opened(problem), METHODS[name], steps)
    tried = {}

    def loss_of(rate: float) -> float:
        tried[rate] = run(rate, 0)
        return _finite(tried[rate]["loss"])

    best = walk(loss_of, METHODS[name].start)
    return {
        "commit": commit(),
        "rate": best,
        "tried": {rate: tried[rate]["loss"] for rate in sorted(tried)},
        "runs": [tried[best], *(run(best, seed) for seed in range(1, seeds))],
    }


def walk(loss_of: Callable[[float], float], start: float) -> float:
    """A rate of the grid without a better neighbour, found downhill."""
    loss_of = functools.cache(loss_of)
    at = GRID.index(start)
    while True:
        near = GRID[max(at - 1, 0) : at + 2]
        best = GRID.index(min(near, key=loss_of))
        if best == at:
            return GRID[at]
        at = best


def step_of(
    problem: Problem, optimizer: optax.GradientTransformation, taps: bool
) -> Callable:
    """One step: (weights and optimizer's state, batch) to the same, and the loss."""
    takes_extra = optax.with_extra_args_support(optimizer)
    where = preconditioned(problem.specs) if taps else None

    def step(carry, batch):
        weights, state = carry
        tapped = params.tap(weights, where) if taps else weights
        loss, g = jax.value_and_grad(problem.loss)(tapped, batch)
        g, stats = params.untap(g)
        extra = {"stats": stats} if taps else {}
        with jax.numpy_dtype_promotion("standard"):
            updates, state = takes_extra.update(g, state, weights, value=loss, **extra)
        return (optax.apply_updates(weights, updates), state), loss

    return step


class Runs:
    """Runs of one method on one problem, by one program for all rates and seeds."""

    def __init__(self, problem: Problem, method: Method, steps: int):
        self.problem, self.method, self.steps = problem, method, steps

        def some_steps(rate, carry, keys):
            step = step_of(problem, self._optimizer(rate), method.taps)
            return jax.lax.scan(lambda c, key: step(c, problem.batch(key)), carry, keys)

        rate, (carry, keys) = jnp.float32(0), self.start(0)
        self.advance = jax.jit(some_steps).lower(rate, carry, keys[0]).compile()

    def _optimizer(self, rate):
        settings = self.method.settings(self.problem, rate)
        return settings.build(self.problem.specs, self.steps)

    def start(self, seed: int):
        """Weights and the optimizer's state, and the keys of the batches."""
        of_weights, of_batches = jax.random.split(jax.random.key(seed))
        weights = params.init(self.problem.specs, of_weights)
        keys = jax.random.split(of_batches, self.steps).reshape(-1, AT_ONCE)
        return (weights, self._optimizer(0.0).init(weights)), keys

    def timed(self) -> Callable[[], float]:
        """A function that goes on with a run for some steps; the seconds they took."""
        carry, keys = self.start(0)

        def seconds():
            nonlocal carry
            start = time.perf_counter()
            carry, _ = self.advance(jnp.float32(1e-4), carry, keys[0])
            jax.block_until_ready(carry)
            return time.perf_counter() - start

        return seconds

    def __call__(self, rate: float, seed: int) -> dict:
        """One run: its losses, and the figures of what it found."""
        carry, keys = self.start(seed)
        losses, followed = [], []
        for part in keys:
            carry, found = self.advance(jnp.float32(rate), carry, part)
            losses.append(rounded(found.mean()))
            if self.problem.follow is not None:
                followed.append(rounded(self.problem.follow(carry[0])))
        figures = self.problem.figures(carry[0])
        return {
            "seed": seed,
            "losses": losses,
            **({"followed": followed} if followed else {}),
            **({"left_at": left_at(carry[1])} if self.method.switches else {}),
            **{name: rounded(x) for name, x in figures.items()},
        }


def rounded(x) -> float | None:
    """To six digits; None where it is not finite."""
    x = float(x)
    return float(f"{x:.6g}") if math.isfinite(x) else None


def _finite(loss: float | None) -> float:
    """A loss, the worst where it was not finite."""
    return math.inf if loss is None else loss


def clock(problem: Problem, methods: list[str], steps: int) -> dict:
    """Milliseconds a step of the methods, by turns: median and quartiles."""
    runs = {name: Runs(problem, METHODS[name], steps) for name in methods}
    programs = {name: run.timed() for name, run in runs.items()}
    seconds = alternate(programs, TURNS)
    return {
        name: quartiles(1e3 * np.array(each) / AT_ONCE)
        for name, each in seconds.items()
    }


def target(data: dict, name: str, share: float = 1.0) -> float:
    """The lowest loss that every run of a method is at within a share of its steps."""
    curves = [_curve(run) for run in data["methods"][name]["runs"]]
    return max(min(map(_finite, c[: round(share * len(c))])) for c in curves)


def steps_to(data: dict, name: str, loss: float) -> list[int | None]:
    """Steps of each of a method's runs until it was at a loss; None: never."""
    found = []
    for run in data["methods"][name]["runs"]:
        at = [i for i, x in enumerate(_curve(run)) if _finite(x) <= loss]
        found.append(data["every"] * (at[0] + 1) if at else None)
    return found


def _curve(run: dict) -> list[float | None]:
    return run["followed"] if "followed" in run else run["losses"]


def draw(data: dict, path) -> None:
    """Losses against steps and seconds, held-out ones where they were looked at.

    One line a method: the median of its seeds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, method) in enumerate(data["methods"].items()):
        curves = [_curve(each) for each in method["runs"]]
        middle = [
            statistics.median(map(_finite, at)) for at in zip(*curves, strict=True)
        ]
        steps = [data["every"] * (i + 1) for i in range(len(middle))]
        seconds = [n * data["clock"][name]["median"] / 1e3 for n in steps]
        how = {
            "color": f"C{number % 10}",
            "linewidth": 1,
            "linestyle": "-" if number < 10 else "--",
            "label": name,
        }
        left.plot(steps, middle, **how)
        right.plot(seconds, middle, **how)
    followed = any("followed" in m["runs"][0] for m in data["methods"].values())
    what = "held-out loss" if followed else "loss of a batch"
    left.set(xlabel="steps", ylabel=what, yscale="log", xlim=(0, None))
    right.set(xlabel="seconds", xscale="log")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)
