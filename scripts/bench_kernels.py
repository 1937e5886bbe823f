"""Time the kernels on this machine and write benchmarks/results/<kernel>.json.

    python scripts/bench_kernels.py --peer-python ../peer/bin/python
    python scripts/bench_kernels.py --device [--shapes long few wide]
    python scripts/bench_kernels.py --cycles

The first is the delta rule on a CPU beside a peer, a Python with torch and
transformers; without one its columns are left out. `--device` is for a TPU or a GPU:
every recurrence's kernel beside plain JAX, in nanoseconds a token and head, bandwidth
and share of the roofline. With `--cycles` nothing is timed: the TPU compiler estimates
the TPU kernels' cycles, on any machine.
"""

import argparse

from benchmarks import delta_rule, kernel_cycles, kernel_times
from benchmarks.cases import delta_rule as cases


def main():
    parser = argparse.ArgumentParser(description="Time the kernels.")
    parser.add_argument("--peer-python", help="a Python with torch and transformers")
    parser.add_argument("--turns", type=int, default=15, help="repeats of every case")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help=f"of {', '.join(cases.SHAPES)}, or with --device of "
        + ", ".join(kernel_times.SHAPES),
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--device", action="store_true", help="all recurrences, for a TPU or a GPU"
    )
    what.add_argument(
        "--cycles", action="store_true", help="estimated on TPUs, instead of times"
    )
    arguments = parser.parse_args()
    known = kernel_times.SHAPES if arguments.device else cases.SHAPES
    unknown = [shape for shape in arguments.shapes or () if shape not in known]
    if unknown:
        parser.error(f"--shapes {' '.join(unknown)}: choose of {', '.join(known)}.")
    if arguments.cycles:
        kernel_cycles.main()
        return
    if arguments.device:
        shapes = arguments.shapes or ["long", "few", "wide"]
        variants = list(kernel_cycles.VARIANTS)
        path = kernel_times.main(shapes, arguments.turns, variants)
    else:
        shapes = arguments.shapes or ["long", "wide", "training", "training_two_steps"]
        path = delta_rule.main(arguments.peer_python, arguments.turns, shapes)
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
