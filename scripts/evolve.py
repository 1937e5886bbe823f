"""Search a config: python scripts/evolve.py configs/cartpole.py [--resume] [--steps 20]

Runs evolution strategies and policy gradients, methods that generate their own data.
Every number and name in the config is an option; --help after the config lists them.
For another environment, method or shaping write another config. --resume continues the
search of the same name.
"""

import logging
import sys

from jaxlab import config
from jaxlab.training.search import SearchConfig, search

ERRORS = (ValueError, TypeError, ArithmeticError, OSError, RuntimeError, ImportError)


def main() -> None:
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", force=True
    )
    arguments = sys.argv[1:]
    cfg = config.parse_cli([a for a in arguments if a != "--resume"])
    if not isinstance(cfg, SearchConfig):
        sys.exit(
            f"error: {arguments[0]} is a {type(cfg).__name__}, not a SearchConfig; "
            "train it with scripts/train.py."
        )
    try:
        search(cfg, resume="--resume" in arguments)
    except ERRORS as error:
        logging.getLogger(__name__).debug("Traceback:", exc_info=True)
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
