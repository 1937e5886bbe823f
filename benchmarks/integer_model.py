"""Train an integer language model by the votes of populations of several sizes.

    python -m benchmarks.integer_model [--steps 300] [--seeds 2]
    python -m benchmarks.integer_model --longer

The text is the Python standard library as bytes, with 5% of its files held out. The
first command compares populations over the same number of steps; the second adds one
longer run to the same file. Bits per byte are measured on the held-out files with the
parameters themselves, without noise; unigrams and bigrams are counted in the training
files. Writes `results/integer_model.json`.
"""

import dataclasses
import json
import time

import jax
import numpy as np
import tyro

from benchmarks.record import RESULTS, record
from jaxlab import data, params
from jaxlab.evolution.integer import IntegerEGGROLL
from jaxlab.evolution.integer import integer_model as model
from jaxlab.training import TextData
from jaxlab.training.problems.integers import heldout_bits_per_byte

POPULATIONS = {16: 16, 128: 16, 1024: 16, 4096: 64}  # members: members per sequence
SEGMENT = 32
EVALUATIONS = 20  # in a run


@dataclasses.dataclass(frozen=True)
class Longer:
    """Settings of the longer run."""

    population: int = 16_384
    members_per_sequence: int = 16
    sigma_shift: int = 4
    decay: float = 0.005
    width: int = 64
    layers: int = 1
    steps: int = 2000
    seed: int = 0


def main(steps: int = 300, seeds: int = 2, longer: bool = False) -> None:
    """Train, evaluate and record.

    Args:
        steps: number of steps for each population.
        seeds: number of runs for each population.
        longer: whether to do only the longer run.
    """
    path = RESULTS / "integer_model.json"
    corpus = data.build(TextData().corpus)
    results = json.loads(path.read_text()) if path.exists() else {}
    results = {name: results.get(name) for name in ("populations", "longer")}
    if longer:
        cfg = Longer()
        es = IntegerEGGROLL(
            cfg.population,
            cfg.sigma_shift,
            cfg.members_per_sequence,
            cfg.decay,
        )
        sizes = model.Config(cfg.width, cfg.layers)
        results["longer"] = run(corpus, es, sizes, cfg.steps, cfg.seed)
    else:
        results["populations"] = {
            str(population): [
                run(
                    corpus,
                    IntegerEGGROLL(population, members_per_sequence=shared),
                    model.Config(),
                    steps,
                    seed,
                )
                for seed in range(seeds)
            ]
            for population, shared in POPULATIONS.items()
        }
    path = record(
        "integer_model",
        corpus=corpus.fingerprint,
        segment=SEGMENT,
        baselines=corpus.baselines,
        **results,
    )
    print(f"Wrote {path}.")


def run(corpus, es: IntegerEGGROLL, cfg: model.Config, steps: int, seed: int) -> dict:
    """Train once and return the settings and the curve."""
    strategy = es.build(cfg)
    weights = params.init(model.spec(cfg), jax.random.key(seed))
    state = strategy.init(weights, jax.random.key(seed + 1000))
    rows = es.population // es.members_per_sequence
    segments = data.stream_segments(corpus.split("train"), rows=rows, length=SEGMENT)
    shape = jax.ShapeDtypeStruct((rows, SEGMENT + 1), np.int32)
    step = jax.jit(strategy.step).lower(state, weights, shape).compile()
    evaluated = sorted({round(steps * i / EVALUATIONS) for i in range(EVALUATIONS + 1)})
    curve, times, moved = [], [], []
    for number in range(steps + 1):
        if number in evaluated:
            most = None if number == steps else 2**17
            reached = heldout_bits_per_byte(corpus, cfg, weights, most)
            curve.append([number, round(sum(times), 2), round(reached, 4)])
            print(f"{es.population} seed {seed}: {curve[-1]}", flush=True)
        if number < steps:
            started = time.monotonic()
            state, weights, figures = step(state, weights, next(segments))
            moved.append(int(figures["moved"]))
            times.append(time.monotonic() - started)
    return {
        "strategy": dataclasses.asdict(es),
        "model": dataclasses.asdict(cfg),
        "parameters": params.count(model.spec(cfg)),
        "seed": seed,
        "steps": steps,
        "bytes_read": steps * rows * SEGMENT,
        "seconds_a_step": round(float(np.median(times)), 5),
        "seconds": round(sum(times), 1),
        "share_moved_last": round(moved[-1] / params.count(model.spec(cfg)), 4),
        "step_seconds_bits_per_byte": curve,
        "bits_per_byte": curve[-1][-1],
    }


if __name__ == "__main__":
    tyro.cli(main)
