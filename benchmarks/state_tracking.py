"""State tracking on S3: Householder steps a token, and the range of beta.

    python -m benchmarks.state_tracking [--seeds 3] [--steps 1200]

Trains `configs/state_tracking.py` in four variants over seeds and scores each on fresh
words at the trained length and at two and four times it. Writes
`results/state_tracking.json`; nothing is chosen on the test words.

Reference: Siems et al., DeltaProduct, arXiv 2502.10297, section 5.1.
"""

import dataclasses
import itertools
import tempfile
import time

import jax
import tyro

from benchmarks.record import record
from jaxlab.evaluation import evaluate
from jaxlab.training import TaskData, TrainConfig, config_file, load_run, train
from jaxlab.training.source import open_source

LENGTHS = (1, 2, 4)  # times the trained length
TEST_ROWS = 1024


def variant(base: TrainConfig, n_householders: int, beta_max: float) -> TrainConfig:
    mixer = dataclasses.replace(
        base.model.pattern[0], n_householders=n_householders, beta_max=beta_max
    )
    return dataclasses.replace(
        base, model=dataclasses.replace(base.model, pattern=(mixer,))
    )


def score(directory: str) -> list[dict]:
    """Accuracy at each test length; its words come from the test stream."""
    run = load_run(directory)
    trained = run.config.data
    assert isinstance(trained, TaskData)
    scores = []
    for times in LENGTHS:
        words = times * (trained.task.length - 1)
        task = dataclasses.replace(trained.task, length=words + 1)
        data = dataclasses.replace(trained, task=task, eval_rows=TEST_ROWS)
        source = open_source(data, 128, run.config.seed)
        with jax.set_mesh(run.mesh):
            found = evaluate(run.params, run.config.model, source.heldout(), run.mesh)
        scores.append(
            {
                "length": words,
                "accuracy": found["accuracy"],
                "accuracy_at_last": float(found["accuracy_by_position"][-1]),
                "row_accuracy": found["row_accuracy"],
            }
        )
    return scores


def main(
    config: str = "configs/state_tracking.py", seeds: int = 3, steps: int = 1200
) -> None:
    """Run all cells.

    Args:
        config: the run that the cells vary.
        seeds: runs a cell, seeds 0, 1, ...
        steps: of each run.
    """
    base = dataclasses.replace(
        config_file.load(config),
        steps=steps,
        eval_every=steps,
        checkpoint_every=steps,
    )
    cells = []
    for n_householders, beta_max in itertools.product((1, 2), (1.0, 2.0)):
        runs = []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as directory:
                cfg = variant(base, n_householders, beta_max)
                cfg = dataclasses.replace(cfg, seed=seed, directory=directory)
                started = time.monotonic()
                train(cfg)
                seconds = time.monotonic() - started
                scores = score(f"{directory}/{cfg.name}")
            runs.append({"seed": seed, "seconds": seconds, "scores": scores})
            print(n_householders, beta_max, runs[-1], flush=True)
        cells.append(
            {"n_householders": n_householders, "beta_max": beta_max, "runs": runs}
        )
    path = record(
        "state_tracking",
        config=config_file.to_json(base),
        test_rows=TEST_ROWS,
        cells=cells,
    )
    print(f"Wrote {path}")


if __name__ == "__main__":
    tyro.cli(main)
