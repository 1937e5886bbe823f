"""Find where a kernel is faster than plain JAX, to choose ``implementation=None``.

    python -m benchmarks.defaults [--only "delta_rule*"] [--case "1024*"]

Nothing runs: the TPU compiler estimates whole programs, including the operations around
a kernel. It estimates XLA's operations by its cost model, which ignores copies, and
kernels by their bundles; null means that there is no estimate. Writes
benchmarks/results/defaults.json; takes about 20 minutes.
"""

import fnmatch
import json
from typing import Any

import tyro

from benchmarks.record import RESULTS, record
from pallas_kernels import aot

CHIPS = ("v5e", "v6e")  # the others have too little VMEM, which the estimate also uses
HEADS = 8
FORMS = ("pallas_tpu", "xla")

OPERATIONS = {
    "delta_rule": {},
    "delta_rule, 2 steps a token": {"N": 2},
    "linear_attention, a head's decay": {},
    "linear_attention, a channel's decay": {"decay": "channel"},
    "selective_scan": {},
}
CASES: dict[str, dict[str, Any]] = {
    "1024 tokens": {"T": 1024},
    "1024 tokens, forward and backward": {"T": 1024, "backward": True},
    "256 tokens, one head": {"T": 256, "H": 1},
    "64 rows of 256 tokens": {"T": 256, "B": 64},
    "64 rows of 64 tokens": {"T": 64, "B": 64},
    "a decode step of 8 rows": {"B": 8},
}
"""In bfloat16 with K = V = 128, and one row of HEADS heads unless stated otherwise; a
"head" of the selective scan is 128 channels of 16 states."""


def jobs(operation: str, case: str) -> dict[tuple[str, str], aot.Job]:
    """The programs of a case by chip and form; none if the operation has no such case.

    The selective scan has no decode step.
    """
    name, arguments = operation.partition(",")[0], OPERATIONS[operation] | CASES[case]
    H = arguments.pop("H", HEADS)
    if name == "selective_scan":
        if "T" not in arguments:
            return {}
        arguments |= {"E": 128 * H}
    else:
        arguments |= {"H": H}
    step = "" if "T" in arguments else "_step"
    program = f"pallas_kernels.programs:{name}{step}"
    return {
        (chip, form): aot.Job(program, arguments | {"implementation": form}, chip)
        for chip in CHIPS
        for form in FORMS
    }


def main(only: str = "*", case: str = "*") -> None:
    """Estimate and record.

    Args:
        only: a glob of operations; the figures of the others are kept.
        case: a glob of cases; the figures of the others are kept.
    """
    recorded = {operation: {} for operation in OPERATIONS}
    if (only, case) != ("*", "*"):
        recorded = json.loads((RESULTS / "defaults.json").read_text())["cycles"]
    cases = fnmatch.filter(CASES, case)
    for operation in fnmatch.filter(OPERATIONS, only):
        for case in cases:
            programs = jobs(operation, case)
            if not programs:
                continue
            cycles = {chip: {} for chip in CHIPS}
            for (chip, form), job in programs.items():
                # Bundles of XLA's own operations cannot all be estimated.
                (report,) = aot.compile_jobs([job], estimate=form != "xla")
                cycles[chip][form] = report.program_cycles
            recorded[operation][case] = cycles
            print(f"{operation}, {case}: {cycles}", flush=True)
    versions = {"libtpu": aot.libtpu_version()}
    print(f"Wrote {record('defaults', cycles=recorded, versions=versions)}.")


if __name__ == "__main__":
    tyro.cli(main)
