"""Compare optimizers on one problem: loss against steps and against seconds.

    python scripts/compare_optimizers.py autoencoder --seeds 3

See `benchmarks/optimizers`.
"""

import sys

import tyro

from benchmarks.optimizers.compare import main

if __name__ == "__main__":
    try:
        tyro.cli(main)
    except ValueError as error:
        sys.exit(str(error))
