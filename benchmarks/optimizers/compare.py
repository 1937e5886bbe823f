"""Compare optimizers with the same parameters, batches and clock.

    python scripts/compare_optimizers.py autoencoder [--seeds 3] [--steps 500]

The learning rate of each method is searched on a grid with the first seed: a walk moves
to the better neighbour until neither is better. The other seeds use that rate. Then all
methods are timed in turns. Writes `results/optimizers_<problem>.json` and `.png`.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
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

AT_ONCE = 10  # steps in a compiled program, and between evaluations on held-out data
TURNS = 9  # of each method when it is timed
GRID = tuple(float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3))


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer, and where the search of its learning rate starts.

    Attributes:
        settings: function from a problem and a learning rate to the optimizer's
            settings; it is traced.
        start: the first learning rate, which must be on the grid.
        taps: whether the optimizer takes statistics.
        switches: whether it stops using its factors at some step.
    """

    settings: Callable[[Problem, Any], Any]
    start: float
    taps: bool = False
    switches: bool = False


def plain(settings: Any, **others):
    """The settings of an optimizer of the library, without weight decay."""

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
    """The settings of MKOR in front of an optimizer; with a switch, of MKOR-H."""

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
    """Run, record and draw. This removes what `kfac` has added to the file.

    Args:
        problem: one of `PROBLEMS`.
        steps: number of steps in a run, a multiple of 10.
        seeds: number of runs of each method at its best rate.
        methods: methods to run; the recorded runs of the others are kept. If there are
            none, all methods are only timed again.
        workers: number of processes, each on its own core.

    Raises:
        ValueError: an option is outside its range, or the runs to keep are missing or
            have other steps or seeds.
    """
    _check(problem, steps, seeds, methods, workers)
    runs_all = set(methods) == set(METHODS)
    studies = {} if runs_all else _recorded(problem, steps, seeds)
    PROBLEMS[problem]()  # prepares its data before the workers read it
    with _workers(workers) as pool:
        futures = {
            pool.submit(study, problem, name, steps, seeds): name for name in methods
        }
        for future in concurrent.futures.as_completed(futures):
            name = futures[future]
            studies[name] = future.result()
            losses = [run["loss"] for run in studies[name]["runs"]]
            print(name, studies[name]["rate"], *losses, flush=True)
    studies = {name: studies[name] for name in METHODS if name in studies}
    path = record(
        f"optimizers_{problem}",
        steps=steps,
        every=AT_ONCE,
        methods=studies,
        clock=clock(PROBLEMS[problem](), list(studies), steps),
    )
    draw(json.loads(path.read_text()), path.with_suffix(".png"))
    print(f"Wrote {path}.")


def _check(
    problem: str, steps: int, seeds: int, methods: tuple[str, ...], workers: int
) -> None:
    if problem not in PROBLEMS:
        raise ValueError(
            f"There is no problem {problem!r}; choose from {', '.join(PROBLEMS)}."
        )
    if steps < 1 or steps % AT_ONCE:
        raise ValueError(f"--steps {steps} must be a multiple of {AT_ONCE} above 0.")
    if seeds < 1:
        raise ValueError(f"--seeds {seeds} must be at least 1.")
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        names = "; ".join(METHODS)  # some of which have a comma
        raise ValueError(f"--methods {'; '.join(unknown)}: choose from {names}.")
    if len(set(methods)) < len(methods):
        raise ValueError("--methods names one of them twice; name it once.")
    available = len(os.sched_getaffinity(0))
    if not 1 <= workers <= available:
        raise ValueError(
            f"--workers {workers} must be from 1 to {available}, the number of "
            "available cores, since each has its own."
        )


def _recorded(problem: str, steps: int, seeds: int) -> dict:
    path = RESULTS / f"optimizers_{problem}.json"
    if not path.exists():
        raise ValueError(f"There is no {path.name} with runs to keep; run all methods.")
    data = json.loads(path.read_text())
    kept = {len(method["runs"]) for method in data["methods"].values()}
    if data["steps"] != steps or kept != {seeds}:
        raise ValueError(
            f"--steps {steps} and --seeds {seeds}, but {path.name} has runs of "
            f"{data['steps']} steps by {' or '.join(map(str, sorted(kept)))} seeds; "
            "use those, or run all methods."
        )
    return data["methods"]


@contextlib.contextmanager
def _workers(count: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Processes with a core each, which end at once when the work is interrupted."""
    with concurrent.futures.ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), _take_a_core, (_cores(),)
    ) as pool:
        try:
            yield pool
        except BaseException:  # Ctrl-C too
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _cores():
    cores = multiprocessing.get_context("spawn").SimpleQueue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    return cores


def _take_a_core(cores) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    if not cores.empty():
        os.sched_setaffinity(0, {cores.get()})


@functools.cache
def opened(problem: str) -> Problem:
    return PROBLEMS[problem]()


def study(problem: str, name: str, steps: int, seeds: int) -> dict:
    """A method's best rate, and its runs at that rate."""
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
    """A rate on the grid that has no better neighbour, found by descent."""
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
    """A step from ((weights, optimizer's state), batch) to (both after it, loss)."""
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
    """Runs of one method on one problem, with one program for all rates and seeds."""

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
        """The weights and the optimizer's state, and the keys of the batches."""
        weights_key, batches_key = jax.random.split(jax.random.key(seed))
        weights = params.init(self.problem.specs, weights_key)
        keys = jax.random.split(batches_key, self.steps).reshape(-1, AT_ONCE)
        return (weights, self._optimizer(0.0).init(weights)), keys

    def timed(self) -> Callable[[], float]:
        """A function that continues a run by `AT_ONCE` steps and returns seconds."""
        carry, keys = self.start(0)

        def seconds():
            nonlocal carry
            start = time.perf_counter()
            carry, _ = self.advance(jnp.float32(1e-4), carry, keys[0])
            jax.block_until_ready(carry)
            return time.perf_counter() - start

        return seconds

    def __call__(self, rate: float, seed: int) -> dict:
        """Do one run and return its losses, and the figures of the trained weights."""
        carry, keys = self.start(seed)
        losses, followed = [], []
        for part in keys:
            carry, step_losses = self.advance(jnp.float32(rate), carry, part)
            losses.append(rounded(step_losses.mean()))
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
    """Round to six significant digits; None for a number that is not finite."""
    x = float(x)
    return float(f"{x:.6g}") if math.isfinite(x) else None


def _finite(loss: float | None) -> float:
    """A loss, or infinity for one that was not finite."""
    return math.inf if loss is None else loss


def clock(problem: Problem, methods: list[str], steps: int) -> dict:
    """Milliseconds per step of each method, timed in turns: median and quartiles."""
    runs = {name: Runs(problem, METHODS[name], steps) for name in methods}
    programs = {name: run.timed() for name, run in runs.items()}
    seconds = alternate(programs, TURNS)
    return {
        name: quartiles(1e3 * np.array(times) / AT_ONCE)
        for name, times in seconds.items()
    }


def target(data: dict, name: str, share: float = 1.0) -> float:
    """The lowest loss that all runs of a method reach within a share of the steps."""
    curves = [_curve(run) for run in data["methods"][name]["runs"]]
    return max(min(map(_finite, c[: round(share * len(c))])) for c in curves)


def steps_to(data: dict, name: str, loss: float) -> list[int | None]:
    """The steps until each run of a method reached a loss; None for never."""
    steps = []
    for run in data["methods"][name]["runs"]:
        at = [i for i, x in enumerate(_curve(run)) if _finite(x) <= loss]
        steps.append(data["every"] * (at[0] + 1) if at else None)
    return steps


def _curve(run: dict) -> list[float | None]:
    return run["followed"] if "followed" in run else run["losses"]


def draw(data: dict, path) -> None:
    """Plot losses over steps and seconds; held-out ones where they were measured.

    Each method has one line, the median of its seeds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, method) in enumerate(data["methods"].items()):
        curves = [_curve(run) for run in method["runs"]]
        medians = [
            statistics.median(map(_finite, at)) for at in zip(*curves, strict=True)
        ]
        steps = [data["every"] * (i + 1) for i in range(len(medians))]
        seconds = [n * data["clock"][name]["median"] / 1e3 for n in steps]
        style = {
            "color": f"C{number % 10}",
            "linewidth": 1,
            "linestyle": "-" if number < 10 else "--",
            "label": name,
        }
        left.plot(steps, medians, **style)
        right.plot(seconds, medians, **style)
    followed = any("followed" in m["runs"][0] for m in data["methods"].values())
    label = "held-out loss" if followed else "loss of a batch"
    left.set(xlabel="steps", ylabel=label, yscale="log", xlim=(0, None))
    right.set(xlabel="seconds", xscale="log")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)
