"""Cycles of the TPU kernels, as the compiler estimates them.

    python -m benchmarks.kernel_cycles

Nothing runs: the compiler simulates the kernel's bundles and its copies, and says the
same on every machine. Writes benchmarks/results/kernel_cycles.json; about five minutes.
"""

from benchmarks.record import record
from pallas_kernels import aot

LENGTH, SHORT, HEADS = 8192, 1024, 16
VARIANTS = {
    "delta rule": {},
    "delta rule, no decay": {"gated": False},
    "delta rule, 2 steps a token": {"N": 2},
    "delta rule, 4 steps a token": {"N": 4},
    "delta rule, forward and backward": {"backward": True},
}
"""Of K = V = 128 in bfloat16, one sequence."""


def lengths(variant: str) -> tuple[int, ...]:
    """Tokens; the long one only of one step forward, for the compiler's time."""
    return (SHORT, LENGTH) if VARIANTS[variant].keys() <= {"gated"} else (SHORT,)


def heads(variant: str, chip: str) -> int:
    """The estimate of the larger kernel takes more VMEM than two of the chips have."""
    crowded = chip in ("v5p", "tpu7x") and "backward" in VARIANTS[variant]
    return HEADS // 2 if crowded else HEADS


def program(variant: str, T: int, chip: str) -> aot.Job:
    arguments = VARIANTS[variant] | {"T": T, "H": heads(variant, chip)}
    return aot.Job("pallas_kernels.programs:delta_rule", arguments, chip)


def roofline(variant: str, chip: str) -> float:
    """Cycles a token and head at least: products of the chunked form, bytes once."""
    steps, d = VARIANTS[variant].get("N", 1), 128
    keys = 128  # a chunk, as in the kernel
    products = steps * (4 * keys * d + 4 * d * d) + 4 * keys * d + 2 * d * d
    moved = 2 * d * 2 * (1 + steps) + 4 * (1 + steps)
    if "backward" in VARIANTS[variant]:
        # K K^T, K Q^T, P^T dO, the solution, M_P, M_A, and dQ and dK of them; K dS',
        # and dO, dR and U with the states, and dS of q and k.
        products += 18 * keys * d + 12 * d * d
        saved = 2 * d * d // keys + 2 * d + 4 * 32  # written, and read again
        moved += 6 * 2 * d + 9 * 4 + 2 * saved
    return aot.roofline(chip, products, moved)


def main() -> None:
    found = {variant: {chip: {} for chip in aot.CHIPS} for variant in VARIANTS}
    for variant in VARIANTS:
        # A process a variant: the compiler does not give its memory back.
        runs = [(chip, T) for T in lengths(variant) for chip in aot.CHIPS]
        jobs = [program(variant, T, chip) for chip, T in runs]
        for (chip, T), report in zip(runs, aot.compile_jobs(jobs), strict=True):
            cycles = report.cycles / T / heads(variant, chip)
            found[variant][chip][str(T)] = {
                "heads": heads(variant, chip),
                "cycles": round(cycles, 3),
                "vmem": max(kernel.vmem for kernel in report.kernels),
                "roofline": round(roofline(variant, chip), 3),
            }
            print(f"{variant}, {T} tokens, {chip}: {cycles:.2f}", flush=True)
    versions = {"libtpu": aot.libtpu_version()}
    print(f"Wrote {record('kernel_cycles', estimated=found, versions=versions)}.")


if __name__ == "__main__":
    main()
