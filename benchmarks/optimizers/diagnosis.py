"""What MKOR's factors do: their smallest eigenvalues along a run.

    python -m benchmarks.optimizers.diagnosis

A factor that is the identity changes nothing; its smallest eigenvalue says by how much
it shortens the direction that its vectors have pointed in most. Writes
`results/optimizers_diagnosis.json`.
"""

import statistics

import jax.numpy as jnp
import numpy as np

from benchmarks.optimizers.compare import AT_ONCE, METHODS, Runs
from benchmarks.optimizers.problems import PROBLEMS
from benchmarks.record import record
from jaxlab.optimizers.mkor import Lacks

METHOD, RATE = METHODS["MKOR, LAMB"], 1e-2  # the best rate of both problems
STEPS = (50, 100, 200)
LOOKED_AT = ("autoencoder", "bytes_attention")


def main() -> None:
    """Run, look and record."""
    found = {name: smallest(name) for name in LOOKED_AT}
    for name, at in found.items():
        print(name, at)
    print(f"Wrote {record('optimizers_diagnosis', rate=RATE, problems=found)}.")


def smallest(problem: str) -> list[dict]:
    """The median over the weights of both factors' smallest eigenvalues, at steps."""
    run = Runs(PROBLEMS[problem](), METHOD, STEPS[-1])
    carry, keys = run.start(0)
    found = []
    for n, part in enumerate(keys, 1):
        carry, _ = run.advance(jnp.float32(RATE), carry, part)
        if n * AT_ONCE in STEPS:
            lacks = carry[1][0].lacks.values()
            found.append({"step": n * AT_ONCE} | _of_factors(list(lacks)))
    return found


def _of_factors(lacks: list[Lacks]) -> dict[str, float]:
    sides = {"a": [each.a for each in lacks], "b": [each.b for each in lacks]}
    return {
        side: round(statistics.median(x for d in factors for x in least(d)), 4)
        for side, factors in sides.items()
    }


def least(lack) -> list[float]:
    """The smallest eigenvalue of each I - D of a stack ``[*stack, n, n]``."""
    lack = np.asarray(lack, np.float64).reshape(-1, *lack.shape[-2:])
    return [float(np.linalg.eigvalsh(np.eye(d.shape[-1]) - d)[0]) for d in lack]


if __name__ == "__main__":
    main()
