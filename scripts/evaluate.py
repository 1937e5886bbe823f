"""Score a run on held-out data: python scripts/evaluate.py runs/tiny."""

import dataclasses
import json
import sys
from typing import Any

import jax
import tyro

from jaxlab import config
from jaxlab.checkpoint import CheckpointError
from jaxlab.objectives import heldout_scores
from jaxlab.training import TextData, load_run
from jaxlab.training.source import open_source


@dataclasses.dataclass
class Arguments:
    """Score a trained run on held-out data; prints JSON."""

    run: tyro.conf.Positional[str]  # directory of the run, such as runs/tiny
    config: str | None = None  # its config file, if that file defines classes
    step: int | None = None  # step of the checkpoint; None: the newest
    batch_size: int = 16  # rows in a batch
    length: int | None = None  # positions in a row; None: as in training
    tokens: int | None = None  # tokens of held-out text to score; None: all of it
    rows: int = 1024  # rows of a task to score, rounded up to whole batches


def scores(args: Arguments) -> dict[str, Any]:
    if args.config is not None:
        config.load(args.config)
    run = load_run(args.run, step=args.step)
    data = run.config.data
    if isinstance(data, TextData):
        length = data.sequence_length if args.length is None else args.length
        data = dataclasses.replace(
            data, sequence_length=length, eval_tokens=args.tokens
        )
    else:
        length = data.task.length if args.length is None else args.length
        task = dataclasses.replace(data.task, length=length)
        data = dataclasses.replace(data, task=task, eval_rows=args.rows)
    if args.batch_size % run.mesh.size:
        raise ValueError(
            f"--batch-size {args.batch_size} is not divisible by the {run.mesh.size} "
            "devices; choose a multiple."
        )
    source = open_source(data, args.batch_size, run.config.seed, resumes=True)
    with jax.set_mesh(run.mesh):
        learned = run.config.learned
        means = heldout_scores(learned, run.params, source.heldout(), run.mesh)
    numbers = {name: x for name, x in means.items() if isinstance(x, float)}
    return {"run": args.run, "step": run.step, "length": length, **numbers} | {
        f"{name}_bits_per_byte": x for name, x in source.baselines.items()
    }


def main() -> None:
    try:
        print(json.dumps(scores(tyro.cli(Arguments, description=__doc__)), indent=1))
    except (CheckpointError, ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
