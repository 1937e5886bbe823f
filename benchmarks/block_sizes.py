"""Choose the TPU kernels' block sizes by the compiler's estimate of their cycles.

The kernels of every candidate, forward and backward, are estimated on two chips, and
each kernel gets its own best sizes on each. Writes the choice where the kernels read
it, and the cycles of every candidate to benchmarks/results/block_sizes.json.
"""

import itertools
import json

from benchmarks.command_line import matching
from benchmarks.record import RESULTS, record
from pallas_kernels import aot
from pallas_kernels.tpu import block_sizes

CHIPS = ("v5e", "v6e")  # the others have too little VMEM, which the estimate also uses
TOKENS, HEADS = 1024, 16
CANDIDATES = {
    "delta_rule": {"heads": (8, 16)},
    "linear_attention, a head's decay": {"heads": (8, 16), "in_turns": (4, 8, 16)},
    "linear_attention, a channel's decay": {"heads": (8, 16), "in_turns": (2, 4, 8)},
    "selective_scan": {"heads": (2, 4, 8), "unroll": (1, 2, 4)},
}
"""Sizes to try, with K = V = 128 in bfloat16; a "head" of the selective scan is 128
channels of 16 states."""


def job(operation: str, sizes: dict[str, int], chip: str) -> aot.Job:
    """The program of an operation's forward and backward kernels."""
    name, _, decay = operation.partition(", a ")
    arguments = {"T": TOKENS, "backward": True, "program": name, "sizes": sizes}
    if name == "selective_scan":  # half of the heads: its code is long
        arguments |= {"E": 128 * HEADS // 2}
    else:
        arguments |= {"H": HEADS}
    if decay:
        arguments |= {"decay": decay.partition("'")[0]}
    return aot.Job("pallas_kernels.programs:with_block_sizes", arguments, chip)


def estimate(operation: str) -> dict[str, list[dict]]:
    """The cycles of every candidate, by kernel; None for one that does not compile."""
    name, comma, decay = operation.partition(",")
    kernels = {f"{name}_{way}": [] for way in ("forward", "backward")}
    choices = CANDIDATES[operation]
    for values in itertools.product(*choices.values()):
        sizes = dict(zip(choices, values, strict=True))
        if sizes.get("in_turns", 0) > sizes["heads"]:
            continue
        reports = aot.compile_jobs([job(operation, sizes, chip) for chip in CHIPS])
        for kernel, candidates in kernels.items():
            cycles = {}
            for chip, report in zip(CHIPS, reports, strict=True):
                counts = [k.cycles for k in report.kernels if k.name == kernel]
                cycles[chip] = counts[0] if counts else None
            candidates.append({"sizes": sizes, "cycles": cycles})
            print(f"{kernel}{comma}{decay} {sizes}: {cycles}", flush=True)
    return {f"{k}{comma}{decay}": candidates for k, candidates in kernels.items()}


def best(candidates: list[dict], chip: str) -> dict[str, int]:
    """The first sizes within 2% of the fewest cycles; later sizes make longer code.

    Candidates without an estimate on the chip are ignored.
    """
    cycles = [c["cycles"][chip] for c in candidates]
    enough = 1.02 * min(n for n in cycles if n is not None)
    return next(
        candidate["sizes"]
        for candidate, n in zip(candidates, cycles, strict=True)
        if n is not None and n <= enough
    )


def table(candidates: dict[str, list[dict]]) -> dict[str, dict[str, dict[str, int]]]:
    """The best sizes by kernel and chip."""
    return {k: {chip: best(candidates[k], chip) for chip in CHIPS} for k in candidates}


def main(only: str = "*") -> None:
    """Estimate the operations that match a glob, and write both files.

    Raises:
        ValueError: no operation matches.
    """
    operations = matching(CANDIDATES, only)
    path = RESULTS / "block_sizes.json"
    candidates = {} if only == "*" else json.loads(path.read_text())["candidates"]
    for operation in operations:
        candidates |= estimate(operation)
    lines = [f'  "{k}": {json.dumps(sizes)}' for k, sizes in table(candidates).items()]
    block_sizes.PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    versions = {"libtpu": aot.libtpu_version()}
    record("block_sizes", tokens=TOKENS, candidates=candidates, versions=versions)
    print(f"Wrote {block_sizes.PATH} and {path}.")
