"""K-FAC on the perceptron problems, to compare with the other optimizers.

    python -m benchmarks.optimizers.kfac autoencoder --peer-python ../kfac/bin/python

kfac-jax runs in its own environment (see `step_time`), on the weights and batches of
`compare`. It adapts its rate, momentum and damping, as in the package's example of an
autoencoder, so there is nothing to tune. Its step takes turns with Adam's. Adds to
`results/optimizers_<problem>.json`, which `compare` has written.
"""

import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.optimizers.compare import (
    AT_ONCE,
    METHODS,
    TURNS,
    Runs,
    draw,
    rounded,
)
from benchmarks.optimizers.problems import PROBLEMS, Problem
from benchmarks.record import RESULTS, commit
from benchmarks.turns import Peer, alternate, quartiles

PEER = pathlib.Path(__file__).with_name("kfac_peer.py")
NAME, BESIDE = "K-FAC", "Adam"  # these take turns
SETTINGS = {"initial_damping": 150.0, "cholesky": True}


def main(problem: tyro.conf.Positional[str], peer_python: str) -> None:
    """Run K-FAC, and add it to the recorded results.

    Args:
        problem: "autoencoder" or "digits".
        peer_python: a Python with kfac-jax.

    Raises:
        ValueError: the problem is not a perceptron.
    """
    opened = PROBLEMS[problem]() if problem in PROBLEMS else None
    if opened is None or opened.drawn is None:
        raise ValueError(
            f"{problem} is not a perceptron, the only network that K-FAC supports "
            "here; choose autoencoder or digits."
        )
    path = RESULTS / f"optimizers_{problem}.json"
    data = json.loads(path.read_text())
    peer = Peer(peer_python, PEER)
    seeds = [run["seed"] for run in data["methods"][BESIDE]["runs"]]
    base = Runs(opened, METHODS[BESIDE], data["steps"])
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / "run.npz"
        runs = [one_run(opened, base, peer, file, seed) for seed in seeds]
        for run in runs:
            print(NAME, run["loss"], flush=True)
        start(opened, base, peer, file, seeds[0])
        seconds = alternate(
            {
                BESIDE: base.timed(),
                NAME: lambda: peer.ask(run=NAME, steps=AT_ONCE)["seconds"],
            },
            TURNS,
        )
    versions = peer.ask()
    times = {name: np.array(x) for name, x in seconds.items()}
    data["methods"][NAME] = {
        "commit": commit(),
        "versions": versions,
        "settings": SETTINGS,
        "rate": None,
        "tried": {},
        "over_adam": quartiles(times[NAME] / times[BESIDE]),
        "runs": runs,
    }
    data["clock"][NAME] = quartiles(1e3 * times[NAME] / AT_ONCE)
    path.write_text(json.dumps(data, indent=2) + "\n")
    draw(data, path.with_suffix(".png"))
    print(f"Wrote {path}.")


def start(
    problem: Problem, base: Runs, peer: Peer, file: pathlib.Path, seed: int
) -> None:
    """Open the contestant with the weights and batches of one seed."""
    assert problem.drawn is not None and problem.rows is not None
    (weights, _), keys = base.start(seed)
    rows = jax.vmap(problem.rows)(keys.reshape(-1))
    layers = [weights[f"layer_{i}"] for i in range(len(weights))]
    arrays: Any = dict(zip(("x", "y"), problem.drawn, strict=False))
    arrays |= {f"{k}_{i}": layer[k] for i, layer in enumerate(layers) for k in layer}
    np.savez(file, rows=rows, **arrays)
    settings = {"path": str(file), "layers": len(layers), **SETTINGS}
    peer.ask(open=NAME, contestant="K-FAC of data", settings=settings)


def one_run(
    problem: Problem, base: Runs, peer: Peer, file: pathlib.Path, seed: int
) -> dict:
    """The losses and figures of one run, in the format of `Runs`."""
    start(problem, base, peer, file, seed)
    losses, followed = [], []
    for _ in range(base.steps // AT_ONCE):
        losses.append(rounded(peer.ask(run=NAME, steps=AT_ONCE)["mean_loss"]))
        if problem.follow is not None:
            followed.append(rounded(problem.follow(weights_of(peer, file))))
    figures = problem.figures(weights_of(peer, file))
    return {
        "seed": seed,
        "losses": losses,
        **({"followed": followed} if followed else {}),
        **{name: rounded(x) for name, x in figures.items()},
    }


def weights_of(peer: Peer, file: pathlib.Path) -> dict:
    """The contestant's weights, in the structure of the problem's parameters."""
    saved = file.with_name("weights.npz")
    peer.ask(weights=NAME, path=str(saved))
    with np.load(saved) as arrays:
        return {
            f"layer_{i}": {k: jnp.asarray(arrays[f"{k}_{i}"]) for k in ("w", "b")}
            for i in range(len(arrays) // 2)
        }


if __name__ == "__main__":
    tyro.cli(main)
