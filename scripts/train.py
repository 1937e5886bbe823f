"""Run a config: python scripts/train.py configs/tiny.py [--resume] [--model.width 64]

Training by gradients, evolution strategies and policy gradients alike. Every number and
name in the config is an option; --help after the config lists them. --resume continues
the run of the same name. With several processes (TPU pods, SLURM, MPI) each one runs
the same command with --distributed.
"""

import logging
import sys

import jax

from jaxlab import config
from jaxlab.training import train

ERRORS = (ValueError, TypeError, ArithmeticError, OSError, RuntimeError, ImportError)


def main() -> None:
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", force=True
    )
    arguments = sys.argv[1:]
    flags = {"--resume", "--distributed"}
    resume = "--resume" in arguments
    cfg = config.parse_cli([a for a in arguments if a not in flags])
    try:
        if "--distributed" in arguments:
            _join_processes()
        train(cfg, resume=resume)
    except ERRORS as error:
        logging.getLogger(__name__).debug("Traceback:", exc_info=True)
        sys.exit(f"error: {error}")


def _join_processes() -> None:
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            f"--distributed found no cluster ({error}) It is for TPU pods, SLURM, MPI "
            "and Kubernetes; leave it out on a single machine."
        ) from error


if __name__ == "__main__":
    main()
