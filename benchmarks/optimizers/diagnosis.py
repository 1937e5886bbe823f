"""The smallest eigenvalues of MKOR's factors along a run.

    python -m benchmarks.optimizers.diagnosis

A factor that is the identity changes nothing; its smallest eigenvalue says how much it
shortens the main direction of its vectors. Writes `results/optimizers_diagnosis.json`.
"""

import statistics

import jax.numpy as jnp
import numpy as np

from benchmarks.optimizers.compare import AT_ONCE, METHODS, Runs
from benchmarks.optimizers.problems import PROBLEMS
from benchmarks.record import record
from jaxlab.optimizers.mkor import Deviations

METHOD, RATE = METHODS["MKOR, LAMB"], 1e-2  # the best rate of both problems
STEPS = (50, 100, 200)
EXAMINED = ("autoencoder", "bytes_attention")


def main() -> None:
    """Run each problem, and record the eigenvalues."""
    medians = {name: smallest(name) for name in EXAMINED}
    for name, at_steps in medians.items():
        print(name, at_steps)
    print(f"Wrote {record('optimizers_diagnosis', rate=RATE, problems=medians)}.")


def smallest(problem: str) -> list[dict]:
    """The median over weights of each factor's smallest eigenvalue, at `STEPS`."""
    run = Runs(PROBLEMS[problem](), METHOD, STEPS[-1])
    carry, keys = run.start(0)
    medians = []
    for n, part in enumerate(keys, 1):
        carry, _ = run.advance(jnp.float32(RATE), carry, part)
        if n * AT_ONCE in STEPS:
            deviations = list(carry[1][0].deviations.values())
            medians.append({"step": n * AT_ONCE} | _of_factors(deviations))
    return medians


def _of_factors(deviations: list[Deviations]) -> dict[str, float]:
    sides = {"a": [pair.a for pair in deviations], "b": [pair.b for pair in deviations]}
    return {
        side: round(statistics.median(x for D in stacks for x in least(D)), 4)
        for side, stacks in sides.items()
    }


def least(D) -> list[float]:
    """The smallest eigenvalue of each factor I - D of a stack ``[*stack, n, n]``."""
    D = np.asarray(D, np.float64).reshape(-1, *D.shape[-2:])
    return [float(np.linalg.eigvalsh(np.eye(d.shape[-1]) - d)[0]) for d in D]


if __name__ == "__main__":
    main()
