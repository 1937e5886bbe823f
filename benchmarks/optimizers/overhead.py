"""What MKOR adds to the training step of a language model.

    python -m benchmarks.optimizers.overhead [--turns 6]

The model, the batch and the base optimizer of `configs/tiny.py`. Two programs tell
where the time goes: the base in a step whose taps nobody uses, and MKOR in a step
without taps, of statistics that are there. All programs make a step by turns; what
counts is the mean of ten. Writes `results/optimizers_overhead.json`.
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

PERIOD = 10  # steps of a turn, and between updates of factors where they are rare
SHOWN = ("milliseconds", "percent")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A training step.

    Attributes:
        optimizer: its transformation.
        baseline: name of the contestant that it is compared with.
        tapped: tree of booleans, the weights whose taps the step takes; None for none.
    """

    optimizer: optax.GradientTransformationExtraArgs
    baseline: str
    tapped: Any = None


def main(turns: int = 6) -> None:
    """Measure and record.

    Args:
        turns: repeats of ten steps of every contestant.
    """
    cfg = config.load("configs/tiny.py")
    bases = {
        "AdamW": cfg.optimizer,
        "LAMB": LAMB(learning_rate=1e-2, schedule=cfg.optimizer.schedule),
    }
    entered = contestants(cfg, bases)
    found = summary(entered, measure(cfg, entered, turns))
    specs = models.spec(cfg.model)
    for name, contestant in entered.items():
        found[name]["state_bytes"] = state_bytes(contestant.optimizer, specs)
        milliseconds, percent = (found[name][k]["median"] for k in SHOWN)
        print(f"{name:25s} {milliseconds:8.1f} ms {percent:+6.1f}%", flush=True)
    path = record(
        "optimizers_overhead",
        turns=turns,
        steps_a_turn=PERIOD,
        config=config.to_json(cfg),
        parameters=params.count(specs),
        contestants=found,
    )
    print(f"Wrote {path}.")


def contestants(cfg: TrainConfig, bases: dict[str, Any]) -> dict[str, Contestant]:
    """Every base alone and behind MKOR; the first also in parts.

    Args:
        cfg: of the model and the schedule.
        bases: settings of optimizers by name.
    """
    specs, found = models.spec(cfg.model), {}

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
        found[name] = Contestant(build(base), name)
        found |= parts if name == first else {}
        found[f"MKOR, {name}"] = Contestant(build(every), name, where)
    return found


def reading_taps() -> optax.GradientTransformationExtraArgs:
    """Changes nothing, but keeps the sum of all taps, so that they are computed."""

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
    """The optimizer with ones for all taps, which lie in its state."""
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
    """Milliseconds a step of each turn, by name, on one device."""
    mesh = params.make_mesh(cfg.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        batch = next(open_source(cfg.data, cfg.batch_size, cfg.seed).train)
        batch = params.place_rows(batch, mesh)
        runs = {name: stepping(cfg, each, batch) for name, each in entered.items()}
        seconds = alternate(runs, turns * PERIOD)
    return {
        name: 1e3 * np.mean(np.reshape(each, (turns, PERIOD)), axis=1)
        for name, each in seconds.items()
    }


def stepping(cfg: TrainConfig, contestant: Contestant, batch) -> Callable[[], float]:
    """A function that makes one step and returns the seconds it took."""
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
    """Times, and the percentages that they are above the baseline's turn by turn."""
    found = {}
    for name, contestant in entered.items():
        ratio = milliseconds[name] / milliseconds[contestant.baseline]
        found[name] = {
            "milliseconds": quartiles(milliseconds[name]),
            "beside": contestant.baseline,
            "percent": quartiles(100 * (ratio - 1)),
        }
    return found


if __name__ == "__main__":
    tyro.cli(main)
