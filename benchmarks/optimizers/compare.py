"""One harness for all optimizers: the same parameters, batches and clock."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.optimizers.problems import Problem
from jaxlab import params
from jaxlab.optimizers.mkor import preconditioned, scale_by_mkor

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


def mkor(base, **settings):
    """MKOR in front of an optimizer."""

    def build(problem: Problem, rate: float):
        first = scale_by_mkor(problem.specs, biases=problem.biases, **settings)
        return optax.chain(first, base(rate))

    return build


def sgd(rate: float):
    return optax.sgd(rate, momentum=0.9)


METHODS = {
    "SGD": Method(lambda _, rate: sgd(rate), (1e-3, 3e-3, 1e-2)),
    "Adam": Method(lambda _, rate: optax.adam(rate), (1e-3, 2e-3, 4e-3)),
    "LAMB": Method(lambda _, rate: optax.lamb(rate), (3e-3, 1e-2, 3e-2)),
    "MKOR, SGD": Method(mkor(sgd), (3e-3, 1e-2, 3e-2), taps=True),
    "MKOR, Adam": Method(mkor(optax.adam), (1e-3, 3e-3, 1e-2), taps=True),
    "MKOR, LAMB": Method(mkor(optax.lamb), (3e-3, 1e-2, 3e-2), taps=True),
}


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
        "losses": [round(x, 3) for x in losses],
        "milliseconds_a_step": round(1e3 * float(times), 3),
        **{name: round(x, 4) for name, x in problem.figures(carry[0]).items()},
    }
