"""The TPU compiler's estimates of the cycles of the TPU kernels.

    python -m benchmarks.kernel_cycles [--only "selective*"]

Nothing runs: the compiler simulates a kernel's bundles and copies, with the same result
on every host. Writes benchmarks/results/kernel_cycles.json; takes about 20 minutes.
"""

import json

import tyro

from benchmarks.command_line import matching, sentences
from benchmarks.record import RESULTS, record
from pallas_kernels import aot

LENGTH, SHORT, HEADS = 8192, 1024, 16
DELTA, LINEAR, SCAN = "delta_rule", "linear_attention", "selective_scan"
CHANNEL = {"decay": "channel"}
VARIANTS = {
    "delta rule": (DELTA, {}),
    "delta rule, no decay": (DELTA, {"gated": False}),
    "delta rule, 2 steps a token": (DELTA, {"N": 2}),
    "delta rule, 4 steps a token": (DELTA, {"N": 4}),
    "delta rule, forward and backward": (DELTA, {"backward": True}),
    "linear attention, a head's decay": (LINEAR, {}),
    "linear attention, a channel's decay": (LINEAR, CHANNEL),
    "linear attention, a head's decay, forward and backward": (
        LINEAR,
        {"backward": True},
    ),
    "linear attention, a channel's decay, forward and backward": (
        LINEAR,
        CHANNEL | {"backward": True},
    ),
    "selective scan": (SCAN, {}),
    "selective scan, forward and backward": (SCAN, {"backward": True}),
}
"""One sequence with K = V = 128 in bfloat16; a "head" of the selective scan is 128
channels of 16 states."""
STEPS = {
    "delta rule": (DELTA, {}),
    "linear attention, a head's decay": (LINEAR, {}),
    "linear attention, a channel's decay": (LINEAR, CHANNEL),
}
"""Decode steps of SEQUENCES sequences with HEADS heads."""
SEQUENCES = 8


def lengths(variant: str) -> tuple[int, ...]:
    """Numbers of tokens; LENGTH only where the compiler's time and VMEM allow it."""
    operation, arguments = VARIANTS[variant]
    long = operation == LINEAR or not arguments.keys() & {"N", "backward"}
    return (SHORT, LENGTH) if long and operation != SCAN else (SHORT,)


def heads(variant: str, chip: str) -> int:
    """The heads of one core; fewer where the estimate would lack VMEM or memory."""
    operation, arguments = VARIANTS[variant]
    backward = "backward" in arguments
    long_code = operation == SCAN and backward  # 8 of them take 6 GiB, 16 take 12
    little_vmem = chip in ("v5p", "tpu7x") and (operation != DELTA or backward)
    return HEADS >> (long_code + little_vmem)


def program(variant: str, T: int, chip: str) -> aot.Job:
    operation, arguments = VARIANTS[variant]
    count = heads(variant, chip)
    width = {"E": 128 * count} if operation == SCAN else {"H": count}
    arguments = arguments | {"T": T} | width
    return aot.Job(f"pallas_kernels.programs:{operation}", arguments, chip)


def step_program(variant: str, chip: str) -> aot.Job:
    operation, arguments = STEPS[variant]
    arguments = arguments | {"B": SEQUENCES, "H": HEADS}
    return aot.Job(f"pallas_kernels.programs:{operation}_step", arguments, chip)


def step_bytes(report: aot.Report) -> float:
    """The bytes that a decode step moves, over reading and writing its states once."""
    return report.moved / (2 * SEQUENCES * HEADS * 128 * 128 * 4)


def roofline(variant: str, chip: str) -> float:
    """The least number of cycles per token and head."""
    return aot.roofline(chip, *least_work(variant))


def least_work(variant: str) -> tuple[int, int]:
    """The least work per token and head, to compute a roofline.

    Returns:
        The operations of the chunked form's products, and the bytes of all arrays.
    """
    operation, arguments = VARIANTS[variant]
    backward, keys, d = "backward" in arguments, 128, 128  # keys a chunk, as there
    if operation == SCAN:  # no products; x, dt and y, and backward their gradients
        return 0, d * (2 + 4 + 2 + (8 + 6 if backward else 0))
    if operation == LINEAR:
        # Q K^T, P V, and Q and K with the states; a channel's decay needs no more.
        products = 4 * keys * d + 4 * d * d
        gates = 4 * d if "decay" in arguments else 4
        moved = 4 * 2 * d + gates
        if backward:
            # P^T, dP, dP^T and dQ, dK, dV of them; dQ, dK, dV and dS of the states.
            products += 12 * keys * d + 8 * d * d
            moved += 7 * 2 * d + 2 * gates + 2 * 2 * d * d // keys
        return products, moved
    steps = arguments.get("N", 1)
    # A key's K K^T and the solution, K S and the sum for S; a token's Q K^T, P E, Q S.
    products = steps * (4 * keys * d + 4 * d * d) + 4 * keys * d + 2 * d * d
    moved = 2 * d * 2 * (1 + steps) + 4 * (1 + steps)
    if backward:
        # K K^T, K Q^T, P^T dO, the solution, M_P twice, M_A, dQ and dK of them; K dS',
        # dO, dR and U with the states, and the sums for dS of q and k.
        products += 18 * keys * d + 12 * d * d
        saved = 2 * d * d // keys + 2 * d + 4 * 32  # written, then read
        moved += 6 * 2 * d + 9 * 4 + 2 * saved
    return products, moved


def main(only: str = "*") -> None:
    """Estimate and record.

    Args:
        only: a glob of variants; the figures of the others are kept, since tests check
            them.

    Raises:
        ValueError: no variant matches.
    """
    variants = matching(VARIANTS, only)
    estimated = {variant: {chip: {} for chip in aot.CHIPS} for variant in VARIANTS}
    if only != "*":
        recorded = json.loads((RESULTS / "kernel_cycles.json").read_text())
        estimated |= recorded["estimated"]
    for variant in variants:
        runs = [(chip, T) for T in lengths(variant) for chip in aot.CHIPS]
        jobs = [program(variant, T, chip) for chip, T in runs]
        for (chip, T), report in zip(runs, aot.compile_jobs(jobs), strict=True):
            cycles = report.cycles / T / heads(variant, chip)
            estimated[variant][chip][str(T)] = {
                "heads": heads(variant, chip),
                "cycles": round(cycles, 3),
                "vmem": max(kernel.vmem for kernel in report.kernels),
                "roofline": round(roofline(variant, chip), 3),
            }
            print(f"{variant}, {T} tokens, {chip}: {cycles:.2f}", flush=True)
    steps = {}
    for variant in STEPS:
        jobs = [step_program(variant, chip) for chip in aot.CHIPS]
        reports = aot.compile_jobs(jobs, estimate=False)
        ratios = [round(step_bytes(report), 4) for report in reports]
        steps[variant] = dict(zip(aot.CHIPS, ratios, strict=True))
        print(f"{variant}, a decode step: {ratios} times the state's bytes", flush=True)
    versions = {"libtpu": aot.libtpu_version()}
    path = record("kernel_cycles", estimated=estimated, steps=steps, versions=versions)
    print(f"Wrote {path}.")


if __name__ == "__main__":
    with sentences():
        tyro.cli(main)
