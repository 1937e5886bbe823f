"""The time that MKOR adds to the training step of a language model.

    python -m benchmarks.optimizers.overhead [--turns 6]

Uses the model, the batch and the base optimizer of `configs/tiny.py`. Two programs show
where the time goes: the base in a step with unused taps, and MKOR in a step without
taps, with given statistics. All programs take turns of one step each, and times are
means of ten steps. Writes `results/optimizers_overhead.json`.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks.record import record
from benchmarks.turns import alternate, quartiles
from jaxlab import config, models, params
from jaxlab.objectives import NextToken
from jaxlab.optimizers import LAMB, MKOR, state_bytes
from jaxlab.training import TrainConfig
from jaxlab.training.source import open_source
from jaxlab.training.state import create_state
from jaxlab.training.step import make_train_step

PERIOD = 10  # steps to average, and between updates of factors where they are rare
SHOWN = ("milliseconds", "percent")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A training step.

    Attributes:
        optimizer: the transformation of the step.
        baseline: name of the contestant to compare it with.
        tapped: tree of booleans, the weights whose taps the step takes; None for none.
    """

    optimizer: optax.GradientTransformationExtraArgs
    baseline: str
    tapped: Any = None


def main(turns: int = 6) -> None:
    """Measure and record.

    Args:
        turns: repetitions of ten steps of each contestant.
    """
    cfg = config.load("configs/tiny.py")
    bases = {
        "AdamW": cfg.optimizer,
        "LAMB": LAMB(learning_rate=1e-2, schedule=cfg.optimizer.schedule),
    }
    entered = contestants(cfg, bases)
    figures = summary(entered, measure(cfg, entered, turns))
    specs = models.spec(cfg.model)
    for name, contestant in entered.items():
        figures[name]["state_bytes"] = state_bytes(contestant.optimizer, specs)
        milliseconds, percent = (figures[name][k]["median"] for k in SHOWN)
        print(f"{name:25s} {milliseconds:8.1f} ms {percent:+6.1f}%", flush=True)
    path = record(
        "optimizers_overhead",
        turns=turns,
        steps_a_turn=PERIOD,
        config=config.to_json(cfg),
        parameters=params.count(specs),
        contestants=figures,
    )
    print(f"Wrote {path}.")


def contestants(cfg: TrainConfig, bases: dict[str, Any]) -> dict[str, Contestant]:
    """Every base alone and with MKOR in front; the first one also in parts.

    Args:
        cfg: has the model and the number of steps.
        bases: settings of optimizers by name.
    """
    specs, entered = models.spec(cfg.model), {}

    def build(settings):
        return settings.build(specs, cfg.steps)

    first = next(iter(bases))
    for name, base in bases.items():
        every, rarely = MKOR(base=base), MKOR(base=base, period=PERIOD)
        where = every.tapped(specs)
        parts = {
            f"{name} with taps unused": Contestant(
                optax.chain(reading_taps(), build(base)), name, where
            ),
            f"MKOR without taps, {name}": Contestant(
                of_given_taps(build(every), specs, where), name
            ),
            f"MKOR every {PERIOD} steps, {name}": Contestant(
                build(rarely), name, where
            ),
        }
        entered[name] = Contestant(build(base), name)
        entered |= parts if name == first else {}
        entered[f"MKOR, {name}"] = Contestant(build(every), name, where)
    return entered


def reading_taps() -> optax.GradientTransformationExtraArgs:
    """A transformation that only stores the sum of all taps, so they are computed."""

    def init(params):
        del params
        return jnp.zeros(())

    def update(updates, state, params=None, *, stats=None, **_):
        del state, params
        return updates, sum(map(jnp.sum, jax.tree.leaves(stats)), start=jnp.zeros(()))

    return optax.GradientTransformationExtraArgs(init, update)


def of_given_taps(
    optimizer: optax.GradientTransformationExtraArgs, specs: Any, where: Any
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with taps of ones, which are part of its state."""
    _, taps = params.untap(params.tap(params.abstract(specs), where))
    taps = jax.tree.map(jnp.ones_like, taps)

    def init(params):
        return optimizer.init(params), taps

    def update(updates, state, params=None, **extra):
        state, given = state
        updates, state = optimizer.update(updates, state, params, **extra, stats=given)
        return updates, (state, given)

    return optax.GradientTransformationExtraArgs(init, update)


def measure(
    cfg: TrainConfig, entered: dict[str, Contestant], turns: int
) -> dict[str, np.ndarray]:
    """The mean milliseconds of a step in each turn, by name, on one device."""
    mesh = params.make_mesh(cfg.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        batch = next(open_source(cfg.data, cfg.batch_size, cfg.seed).train)
        batch = params.place_rows(batch, mesh)
        runs = {name: stepping(cfg, one, batch) for name, one in entered.items()}
        seconds = alternate(runs, turns * PERIOD)
    return {
        name: 1e3 * np.mean(np.reshape(times, (turns, PERIOD)), axis=1)
        for name, times in seconds.items()
    }


def stepping(cfg: TrainConfig, contestant: Contestant, batch) -> Callable[[], float]:
    """A function that takes one step and returns the seconds it took."""
    optimizer = contestant.optimizer
    step = make_train_step(
        NextToken(cfg.model), optimizer, cfg.accumulate, contestant.tapped
    )
    state = create_state(
        models.spec(cfg.model), optimizer, jax.sharding.get_mesh(), cfg.seed
    )

    key = jax.random.key(cfg.seed)

    def seconds() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = step(state, batch, key)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    return seconds


def summary(
    entered: dict[str, Contestant], milliseconds: dict[str, np.ndarray]
) -> dict[str, dict]:
    """Times, and the percentages by which they exceed the baseline's in each turn."""
    figures = {}
    for name, contestant in entered.items():
        ratio = milliseconds[name] / milliseconds[contestant.baseline]
        figures[name] = {
            "milliseconds": quartiles(milliseconds[name]),
            "beside": contestant.baseline,
            "percent": quartiles(100 * (ratio - 1)),
        }
    return figures


if __name__ == "__main__":
    tyro.cli(main)
