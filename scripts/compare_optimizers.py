"""Compare optimizers on one problem: loss against steps and against seconds.

    python scripts/compare_optimizers.py autoencoder --seeds 3

See `benchmarks/optimizers`.
"""

import tyro

from benchmarks.command_line import sentences
from benchmarks.optimizers.compare import main

if __name__ == "__main__":
    with sentences():
        tyro.cli(main)
