"""The cost of every mixer: decoding early and late, training by length, and memory.

    python -m benchmarks.mixers [--turns 9] [--only "delta*"]

One layer, one sequence, float32. A mixer with a state of fixed size decodes as fast
after 65536 tokens as after 1024, and its training time and memory grow linearly with
the length; full attention is the exception. All contestants take turns, so that other
load affects them equally. One of them is a feed-forward layer: its work is linear in
the length by definition, yet once it outgrows the cache the measured power is above 1.
Writes `results/mixers.json`.
"""

import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.record import record
from benchmarks.turns import alternate, power, quartiles, timed
from jaxlab import params
from jaxlab.feedforward import swiglu
from jaxlab.mixers import MIXERS, attention, delta_product, mixer_of

WIDTH = 256
POSITIONS = (1024, 65_536)
LENGTHS = (512, 1024, 2048, 4096, 8192)
STEPS = 64  # tokens decoded in a turn
PREFILL = 256  # tokens in a call


def configs() -> dict[str, Any]:
    """Every mixer at its default sizes, and variants with other costs."""
    defaults: dict[str, Any] = {n: mixer.Config(WIDTH) for n, mixer in MIXERS.items()}
    return defaults | {
        "attention, window 256": attention.Config(WIDTH, window=256),
        "gated_delta_net": delta_product.Config(WIDTH, n_householders=1, beta_max=1.0),
    }


def main(turns: int = 9, only: str = "*") -> None:
    """Measure and record.

    Args:
        turns: repetitions of each measurement.
        only: a glob of the names of mixers.
    """
    mixers = {}
    for name, cfg in configs().items():
        if not fnmatch.fnmatchcase(name, only):
            continue
        weights = params.init(mixer_of(cfg).spec(cfg), jax.random.key(0))
        decoding = decode(cfg, weights, turns)
        training, control, memory = train(cfg, weights, turns)
        mixers[name] = {
            "parameters": params.count(mixer_of(cfg).spec(cfg)),
            "state_floats": state_floats(cfg),
            "decode_milliseconds": [quartiles(times) for times in decoding],
            "decode_ratio": quartiles(decoding[-1] / decoding[0]),
            "train_milliseconds": [quartiles(times) for times in training],
            "train_exponent": quartiles(exponent(training)),
            "above_feed_forward": quartiles(exponent(training) - exponent(control)),
            "train_temporary_MB": memory,
            "memory_exponent": round(float(exponent(np.array(memory))), 2),
        }
        report(name, mixers[name])
    path = record(
        "mixers",
        turns=turns,
        width=WIDTH,
        batch=1,
        dtype="float32",
        positions=POSITIONS,
        lengths=LENGTHS,
        mixers=mixers,
    )
    print(f"Wrote {path}")


def state_floats(cfg) -> int:
    """The count of numbers in one sequence's state after POSITIONS[0] tokens."""
    state = jax.eval_shape(
        lambda: mixer_of(cfg).init_state(cfg, 1, max_length=POSITIONS[0])
    )
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def decode(cfg, weights, turns: int) -> np.ndarray:
    """Milliseconds per token of `step` at each of POSITIONS, after a full prefill.

    Returns:
        ``[position, turn]``.
    """
    mixer = mixer_of(cfg)

    @jax.jit
    def prefill(weights, x_BTd, state):
        return mixer.forward(weights, x_BTd, cfg, state=state)[1]

    def steps(weights, x_TBd, state):
        def one(state, x_Bd):
            y_Bd, state = mixer.step(weights, x_Bd, cfg, state)
            return state, y_Bd

        return jax.lax.scan(one, state, x_TBd)[1]

    programs = {}
    keys = jax.random.split(jax.random.key(1), max(POSITIONS) // PREFILL)
    for position in POSITIONS:
        state = mixer.init_state(cfg, 1, max_length=position + STEPS)
        for key in keys[: position // PREFILL]:
            x_BTd = jax.random.normal(key, (1, PREFILL, WIDTH))
            state = prefill(weights, x_BTd, state)
        arguments = weights, jax.random.normal(keys[0], (STEPS, 1, WIDTH)), state
        programs[str(position)] = jax.jit(steps).lower(*arguments).compile(), arguments
    seconds = alternate({p: timed(program) for p, program in programs.items()}, turns)
    return 1e3 / STEPS * np.array([seconds[str(p)] for p in POSITIONS])


def train(cfg, weights, turns: int) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Milliseconds of forward and backward at each of LENGTHS, and temporary MB.

    Returns:
        The times of the mixer and of the feed-forward layer, each ``[length, turn]``,
        and the mixer's memory.
    """
    mixer = mixer_of(cfg)
    feedforward = swiglu.Config(WIDTH, hidden=8 * WIDTH // 3)
    hidden = params.init(swiglu.spec(feedforward), jax.random.key(0))
    layers = {
        "mixer": (
            lambda weights, x_BTd: mixer.forward(weights, x_BTd, cfg)[0],
            weights,
        ),
        "feed-forward": (
            lambda weights, x_BTd: swiglu.forward(weights, x_BTd, feedforward),
            hidden,
        ),
    }
    programs = {}
    for length in LENGTHS:
        x_BTd = jax.random.normal(jax.random.key(2), (1, length, WIDTH))
        for name, (layer, layer_weights) in layers.items():
            gradient = jax.jit(jax.grad(_loss_of(layer), argnums=(0, 1)))
            arguments = layer_weights, x_BTd
            compiled = gradient.lower(*arguments).compile()
            programs[f"{name} {length}"] = compiled, arguments
    seconds = alternate({n: timed(program) for n, program in programs.items()}, turns)
    times = {n: np.array([seconds[f"{n} {T}"] for T in LENGTHS]) for n in layers}
    compiled = [programs[f"mixer {length}"][0] for length in LENGTHS]
    memory = [round(c.memory_analysis().temp_size_in_bytes / 1e6, 1) for c in compiled]
    return 1e3 * times["mixer"], 1e3 * times["feed-forward"], memory


def _loss_of(layer):
    return lambda weights, x_BTd: jnp.mean(layer(weights, x_BTd) ** 2)


def exponent(values: np.ndarray) -> np.ndarray:
    """p of the least-squares fit of values ~ length^p, from T = 1024 on.

    At shorter lengths costs that do not depend on the length matter.

    Args:
        values: ``[length, ...]``; each column, such as a turn, has its own fit.
    """
    fitted = [i for i, length in enumerate(LENGTHS) if length >= 1024]
    return power([LENGTHS[i] for i in fitted], values[fitted])


def report(name: str, costs: dict) -> None:
    early, late = (t["median"] for t in costs["decode_milliseconds"])
    print(
        f"{name:25s} step {early:.3f} -> {late:.3f} ms, "
        f"x{costs['decode_ratio']['median']:.2f}; "
        f"train {costs['train_milliseconds'][-1]['median']:.0f} ms at T={LENGTHS[-1]}, "
        f"T^{costs['train_exponent']['median']:.2f} "
        f"({costs['above_feed_forward']['median']:+.2f} to a feed-forward layer's); "
        f"{costs['train_temporary_MB'][-1]:.0f} MB, "
        f"T^{costs['memory_exponent']}",
        flush=True,
    )


if __name__ == "__main__":
    tyro.cli(main)
