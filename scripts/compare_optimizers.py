"""Compare optimizers on one problem: loss against steps and against seconds.

    python scripts/compare_optimizers.py autoencoder --seeds 3

See `benchmarks/optimizers`.
"""

import pathlib
import sys

import tyro

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks.optimizers.compare import main  # noqa: E402

if __name__ == "__main__":
    try:
        tyro.cli(main)
    except ValueError as error:
        sys.exit(str(error))
