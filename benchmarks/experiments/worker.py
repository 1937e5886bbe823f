"""Train and score one run of an experiment in its own process.

    python -m benchmarks.experiments.worker MODULE SCALE LABEL SEED CORE RESULT.json

The result file appears only when it is complete. CORE is the only core that the process
may use, or -1 for all.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import sys
import tempfile
import time

import jax

from benchmarks.experiments.runner import scoring_of
from benchmarks.record import commit
from jaxlab import models, params
from jaxlab.training import TextData, TrainConfig, load_run, train


def main(module: str, scale: str, label: str, seed: int, core: int, path: str) -> None:
    if core >= 0:
        os.sched_setaffinity(0, {core})  # before the first use of JAX starts threads
    experiment = importlib.import_module(module)
    stages = experiment.cells(scale)[label]
    result = pathlib.Path(path)
    with tempfile.TemporaryDirectory(
        prefix=f"{result.stem}.", dir=result.parent
    ) as directory:
        started = time.monotonic()
        trained = None
        for i, cfg in enumerate(stages):
            reached = train(
                dataclasses.replace(
                    cfg,
                    name=f"stage{i}",
                    directory=directory,
                    init_from=trained,
                    seed=seed,
                    eval_every=cfg.steps,
                    checkpoint_every=cfg.steps,
                )
            )
            if reached["step"] < cfg.steps:
                sys.exit(f"Stopped at step {reached['step']:.0f} of {cfg.steps}.")
            trained = f"{directory}/stage{i}"
        seconds = time.monotonic() - started
        scores = experiment.score(load_run(f"{directory}/stage{len(stages) - 1}"))
        content = {
            "label": label,
            "seed": seed,
            "seconds": round(seconds, 1),
            "parameters": params.count(models.spec(stages[-1].model)),
            "state_floats": state_floats(stages[-1]),
            "device": jax.devices()[0].device_kind,
            "cpus": len(os.sched_getaffinity(0)),
            "commit": commit(),
            "scoring": scoring_of(experiment),
            "scores": scores,
        }
        unfinished = pathlib.Path(directory) / "result.json"
        unfinished.write_text(json.dumps(content))
        unfinished.rename(result)


def state_floats(cfg: TrainConfig) -> int:
    """The count of numbers in the state of a sequence as long as a training row."""
    data = cfg.data
    length = data.sequence_length if isinstance(data, TextData) else data.task.length
    state = jax.eval_shape(lambda: models.init_state(cfg.model, 1, length))
    return sum(leaf.size for leaf in jax.tree.leaves(state))


if __name__ == "__main__":
    module, scale, label, seed, core, path = sys.argv[1:]
    main(module, scale, label, int(seed), int(core), path)
