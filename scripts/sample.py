"""Continue a prompt: python scripts/sample.py runs/tiny --prompt "def main("."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxlab import config
from jaxlab.checkpoint import CheckpointError
from jaxlab.data import continuation
from jaxlab.inference import SamplingParams, generate
from jaxlab.objectives import NextToken
from jaxlab.training import load_run, load_run_tokenizer
from jaxlab.training.telling import tell


@dataclasses.dataclass
class Arguments:
    """Sample text from a trained run."""

    run: tyro.conf.Positional[str]  # directory of the run, such as runs/tiny
    prompt: str = "def "
    config: str | None = None  # its config file, if that file defines classes
    step: int | None = None  # step of the checkpoint; None: the newest
    sampling: tyro.conf.OmitArgPrefixes[SamplingParams] = SamplingParams()


def main() -> None:
    args = tyro.cli(Arguments, description=__doc__)
    try:
        if args.config is not None:
            config.load(args.config)
        run = load_run(args.run, step=args.step)
        if not isinstance(run.config.learned, NextToken):
            learned = type(run.config.learned).__name__
            raise ValueError(
                f"{args.run} was trained on {learned}, which generates no text."
            )
        tokenizer = load_run_tokenizer(args.run, run.config)
        prompt = tokenizer.encode(args.prompt)
        with jax.set_mesh(run.mesh):
            tokens = generate(
                run.params,
                jnp.array([[tokenizer.separator, *prompt]], jnp.int32),
                run.config.learned.model,
                args.sampling,
                vocab_size=tokenizer.vocab_size,
            )
    except (CheckpointError, ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    text = continuation(tokenizer, prompt, np.asarray(tokens)[0])
    tell(f"{args.prompt}{text}\n")


if __name__ == "__main__":
    main()
