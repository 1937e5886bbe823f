"""Time the kernels and write benchmarks/results/<kernel>.json.

    python scripts/bench_kernels.py --peer-python ../peer/bin/python
    python scripts/bench_kernels.py --device [--shapes long few wide]
    python scripts/bench_kernels.py --cycles

The first command times the delta rule on a CPU, and a peer implementation if it is
given a Python that has torch and transformers. `--device` is for a TPU or a GPU: it
compares the kernel of every recurrence with plain JAX, in nanoseconds a token and head,
bandwidth and share of the roofline. `--cycles` times nothing: the TPU compiler
estimates the cycles of the TPU kernels on any machine.
"""

import argparse

from benchmarks import delta_rule, kernel_cycles, kernel_times
from benchmarks.cases import delta_rule as cases
from benchmarks.command_line import sentences

MEANINGLESS = {"cycles": ("peer_python", "turns", "shapes"), "device": ("peer_python",)}
"""By mode, the options that mean nothing with it."""


def main():
    parser = argparse.ArgumentParser(description="Time the kernels.")
    parser.add_argument("--peer-python", help="a Python with torch and transformers")
    parser.add_argument("--turns", type=int, help="repetitions of each case (15)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help=f"from {', '.join(cases.SHAPES)}; with --device from "
        + ", ".join(kernel_times.SHAPES),
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--device", action="store_true", help="time all recurrences on a TPU or a GPU"
    )
    mode.add_argument(
        "--cycles", action="store_true", help="estimate cycles on TPUs instead of times"
    )
    arguments = parser.parse_args()
    with sentences():
        check(arguments)
        run(arguments)


def check(arguments: argparse.Namespace) -> None:
    """Raise a ValueError that names an option which cannot be."""
    for mode, names in MEANINGLESS.items():
        for name in names if getattr(arguments, mode) else ():
            if getattr(arguments, name) is not None:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} has no use with --{mode}; leave it out.")
    if arguments.turns is not None and arguments.turns < 1:
        raise ValueError(f"--turns {arguments.turns} must be at least 1.")
    known = kernel_times.SHAPES if arguments.device else cases.SHAPES
    unknown = [shape for shape in arguments.shapes or () if shape not in known]
    if unknown:
        raise ValueError(
            f"--shapes {' '.join(unknown)}: choose from {', '.join(known)}."
        )


def run(arguments: argparse.Namespace) -> None:
    turns = 15 if arguments.turns is None else arguments.turns
    if arguments.cycles:
        kernel_cycles.main()
        return
    if arguments.device:
        shapes = arguments.shapes or ["long", "few", "wide"]
        path = kernel_times.main(shapes, turns, list(kernel_cycles.VARIANTS))
    else:
        shapes = arguments.shapes or ["long", "wide", "training", "training_two_steps"]
        path = delta_rule.main(arguments.peer_python, turns, shapes)
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
