"""Choose the TPU kernels' block sizes by estimated cycles; no TPU is needed.

    python scripts/tune_kernels.py [--only "selective*"]

Writes pallas_kernels/tpu/block_sizes.json, which the kernels read, and the cycles of
every candidate to benchmarks/results/block_sizes.json. Takes about 20 minutes.
"""

import argparse

from benchmarks import block_sizes
from benchmarks.command_line import sentences


def main():
    parser = argparse.ArgumentParser(description="Choose the TPU kernels' block sizes.")
    parser.add_argument(
        "--only",
        default="*",
        metavar="GLOB",
        help=f"operations to tune, from {', '.join(block_sizes.CANDIDATES)}",
    )
    arguments = parser.parse_args()
    with sentences():
        block_sizes.main(arguments.only)


if __name__ == "__main__":
    main()
