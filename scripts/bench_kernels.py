"""Time the kernels on this machine and write benchmarks/results/<kernel>.json.

    python scripts/bench_kernels.py --peer-python ../peer/bin/python
    python scripts/bench_kernels.py --cycles

The peer is a Python with torch and transformers, to compare with; without one its
columns are left out. With `--cycles` nothing is timed: the TPU compiler estimates the
TPU kernels' cycles, on any machine.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import delta_rule, kernel_cycles  # noqa: E402
from pallas_kernels.delta_rule import cases  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description="Time the kernels.")
    parser.add_argument("--peer-python", help="a Python with torch and transformers")
    parser.add_argument("--turns", type=int, default=15, help="repeats of every case")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["long", "wide", "training", "training_two_steps"],
        choices=cases.SHAPES,
    )
    parser.add_argument(
        "--cycles", action="store_true", help="estimated on TPUs, instead of times"
    )
    arguments = parser.parse_args()
    if arguments.cycles:
        kernel_cycles.main()
        return
    path = delta_rule.main(arguments.peer_python, arguments.turns, arguments.shapes)
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
