"""Registers and shared memory of the GPU kernels, as the compiler assigns them.

    python -m benchmarks.gpu_kernels

Nothing runs: the kernels are compiled for an H100, on any machine. Writes
benchmarks/results/gpu_kernels.json.
"""

from benchmarks.record import record
from pallas_kernels import aot

DELTA = "pallas_kernels.programs:delta_rule"
PAGED = "pallas_kernels.programs:paged_attention"
ROOM = (32, 32, 1024, 64)  # sequences, queries, pages, pages per sequence
VARIANTS = {
    "delta rule, K = V = 64": (DELTA, {"T": 8192, "K": 64, "V": 64}),
    "delta rule, K = V = 128": (DELTA, {"T": 8192}),
    "delta rule, 2 steps a token, K = V = 128": (DELTA, {"T": 8192, "N": 2}),
    "paged attention, 32 heads of 128, 8 of keys": (
        PAGED,
        {"heads": (32, 8, 128, 16), "room": ROOM, "dtype": "bfloat16"},
    ),
}


def job(variant: str) -> aot.Job:
    program, arguments = VARIANTS[variant]
    arguments = arguments | {"implementation": "pallas_gpu"}
    if program == DELTA:
        arguments["backward"] = True
    return aot.Job(program, arguments, "h100")


def main() -> None:
    reports = aot.compile_jobs([job(variant) for variant in VARIANTS])
    compiled = {}
    for variant, report in zip(VARIANTS, reports, strict=True):
        if report.error is not None:
            raise RuntimeError(report.error)
        compiled[variant] = {
            kernel.name: {
                "registers": kernel.registers,
                "spilled_bytes": kernel.stored + kernel.loaded,
                "shared_bytes": kernel.shared,
            }
            for kernel in report.kernels
        }
        print(variant, compiled[variant], flush=True)
    versions = {"nvidia-cuda-nvcc": aot.nvcc_version()}
    print(f"Wrote {record('gpu_kernels', compiled=compiled, versions=versions)}.")


if __name__ == "__main__":
    main()
