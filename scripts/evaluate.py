"""Score a run on held-out data: python scripts/evaluate.py runs/tiny."""

import dataclasses
import json
import signal
import sys
from typing import Any

import jax
import tyro

from jaxlab import config
from jaxlab.checkpoint import CheckpointError
from jaxlab.data import open_corpus
from jaxlab.objectives import heldout_scores
from jaxlab.training import TaskData, TextData, load_run
from jaxlab.training.source import open_source

LEAST = {"step": 0, "batch_size": 1, "length": 1, "tokens": 1, "rows": 1}
"""The least value of every option that is a number."""


@dataclasses.dataclass
class Arguments:
    """Score a trained run on held-out data; prints JSON."""

    run: tyro.conf.Positional[str]  # directory of the run, such as runs/tiny
    config: str | None = None  # its config file, if that file defines classes
    step: int | None = None  # step of the checkpoint; None: the newest
    batch_size: int = 16  # rows in a batch
    length: int | None = None  # positions in a row; None: as in training
    tokens: int | None = None  # tokens of held-out text to score; None: all of it
    rows: int | None = None  # rows of a task, up to whole batches; None: 1024


def scores(args: Arguments) -> dict[str, Any]:
    check(args)
    if args.config is not None:
        config.load(args.config)
    run = load_run(args.run, step=args.step)
    if args.batch_size % run.mesh.size:
        raise ValueError(
            f"--batch-size {args.batch_size} is not divisible by the {run.mesh.size} "
            "devices; choose a multiple."
        )
    is_text = isinstance(run.config.data, TextData)
    data = text(args, run.config.data) if is_text else task(args, run.config.data)
    source = open_source(data, args.batch_size, run.config.seed, resumes=True)
    try:
        with jax.set_mesh(run.mesh):
            learned = run.config.learned
            means = heldout_scores(learned, run.params, source.heldout(), run.mesh)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE" not in str(error):
            raise
        raise ValueError(
            f"{args.batch_size} rows of {source.row_length} positions cannot be scored "
            f"at a time ({error}); choose a smaller --batch-size or --length."
        ) from error
    numbers = {name: x for name, x in means.items() if isinstance(x, float)}
    return {"run": args.run, "step": run.step, "length": source.row_length} | {
        **numbers,
        **{f"{name}_bits_per_byte": x for name, x in source.baselines.items()},
    }


def check(args: Arguments) -> None:
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {value} must be at least {least}.")


def text(args: Arguments, data: TextData) -> TextData:
    """The run's text, in the rows that were asked for."""
    if args.rows is not None:
        raise ValueError(
            f"--rows is for a task, and {args.run} was trained on text; use --tokens."
        )
    if args.length is None:
        return dataclasses.replace(data, eval_tokens=args.tokens)
    tokens = open_corpus(data.corpus.directory).split("heldout").tokens
    if 1 < tokens <= args.length:
        raise ValueError(
            f"--length {args.length} does not fit into the held-out text of {tokens} "
            f"tokens; choose at most {tokens - 1}."
        )
    return dataclasses.replace(
        data, sequence_length=args.length, eval_tokens=args.tokens
    )


def task(args: Arguments, data: TaskData) -> TaskData:
    """The run's task, in the rows that were asked for."""
    if args.tokens is not None:
        raise ValueError(
            f"--tokens is for text, and {args.run} was trained on a task; use --rows."
        )
    length = data.task.length if args.length is None else args.length
    rows = 1024 if args.rows is None else args.rows
    asked = dataclasses.replace(data.task, length=length)
    return dataclasses.replace(data, task=asked, eval_rows=rows)


def main() -> None:
    args = tyro.cli(Arguments, description=__doc__)
    try:
        print(json.dumps(scores(args), indent=1))
    except (CheckpointError, ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("Stopped; nothing was scored.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
