"""Train a config: python scripts/train.py configs/tiny.py [--resume] [--model.width 64]

Every field of the config is an option; --help lists them. With several processes (TPU
pods, SLURM, MPI) each runs the same command with --distributed.
"""

import logging
import sys

import jax

from jaxlab.training import config_file, train


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    arguments = sys.argv[1:]
    flags = {"--resume", "--distributed"}
    resume = "--resume" in arguments
    cfg = config_file.parse_cli([a for a in arguments if a not in flags])
    if "--distributed" in arguments:
        jax.distributed.initialize()
    try:
        train(cfg, resume=resume)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        logging.getLogger(__name__).debug("Traceback:", exc_info=True)
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
