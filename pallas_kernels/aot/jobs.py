"""Jobs: programs to compile for a chip, in another process."""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pallas_kernels.aot import gpu, tpu


class Job(NamedTuple):
    """A program to compile: "module:function", its keyword arguments, and a chip."""

    program: str
    arguments: dict[str, Any]
    chip: str


class Report(NamedTuple):
    """The result of a job: its kernels, or the reason why there are none.

    Attributes:
        kernels: each a `tpu.Kernel` or a `gpu.Kernel`.
        moved: bytes that the operations of the whole program read and write, including
          those that stay in VMEM; for kernels, by their cost estimates. 0 for a GPU.
        program_cycles: cycles of the whole program; see `tpu.program_cycles`.
        seconds: duration of the compilation.
        error: the error message; None if the job was compiled.
    """

    kernels: tuple[Any, ...]
    moved: float
    program_cycles: int | None
    seconds: float
    error: str | None

    @property
    def cycles(self) -> int:
        """Estimated cycles of all kernels.

        Raises:
            RuntimeError: the job was not compiled, or a kernel has no estimate.
        """
        if self.error is not None:
            raise RuntimeError(self.error)
        known = [getattr(kernel, "cycles", None) for kernel in self.kernels]
        if not known or None in known:
            raise RuntimeError(f"There is no estimate of all kernels of {self}.")
        return sum(c for c in known if c is not None)


def available(chip: str = "v5e") -> bool:
    """Whether a compiler for a chip is installed."""
    return _compiler(chip).available()


def compile_jobs(jobs: Iterable[Job], estimate: bool = True) -> list[Report]:
    """Compile the jobs one after another; a crash of the compiler becomes a report.

    Args:
        jobs: the programs.
        estimate: whether to estimate a TPU's cycles too. The estimator uses VMEM
          itself, and ends the process on copies that it cannot model (strided ones,
          and tables in SMEM on some chips).

    Raises:
        ModuleNotFoundError: a compiler is not installed.
        ValueError: a chip is unknown.
    """
    reports, waiting = [], list(jobs)
    for job in waiting:
        compiler = _compiler(job.chip)
        if not compiler.available():
            raise ModuleNotFoundError(compiler.HOW_TO_INSTALL)
    while waiting:
        compiler = _compiler(waiting[0].chip)
        others = (i for i, j in enumerate(waiting) if _compiler(j.chip) != compiler)
        # An estimate takes up to 6 GiB, which the compiler does not free.
        most = 1 if estimate else compiler.JOBS_A_PROCESS
        batch = waiting[: next(others, len(waiting))][:most]
        new_reports = _compile_until_crash(batch, estimate)
        reports += new_reports
        waiting = waiting[len(new_reports) :]
    return reports


def _compiler(chip: str):
    for compiler in (tpu, gpu):
        if chip in compiler.CHIPS:
            return compiler
    known = ", ".join((*tpu.CHIPS, *gpu.CHIPS))
    raise ValueError(
        f"There is no compiler for the chip {chip!r}; choose one of {known}."
    )


def _compile_until_crash(jobs: Sequence[Job], estimate: bool) -> list[Report]:
    """The reports of the jobs up to and including the first crash; at least one."""
    compiler = _compiler(jobs[0].chip)
    with tempfile.TemporaryDirectory() as dump:
        started = time.monotonic()
        process = subprocess.run(
            [sys.executable, "-m", "pallas_kernels.aot"],
            input=json.dumps([jobs, dump]),
            env=os.environ | compiler.environment(dump, estimate),
            capture_output=True,
            text=True,
        )
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    reports = [_from_json(json.loads(line), compiler) for line in lines]
    if len(reports) < len(jobs):
        seconds = time.monotonic() - started
        error = _crash(process.stderr, jobs[len(reports)])
        reports.append(Report((), 0.0, None, seconds, error))
    return reports


def _crash(stderr: str, job: Job) -> str:
    """The error message for a crash: the compiler's last words, without the trace."""
    lines = stderr.splitlines()
    fatal = [i for i, line in enumerate(lines) if re.match(r"F\d{4} ", line)]
    message = lines[fatal[0] :][:3] if fatal else lines[-3:]
    return f"The compiler ended the process on {job}: {' '.join(message)}"


def _from_json(fields: dict[str, Any], compiler) -> Report:
    fields["kernels"] = tuple(compiler.Kernel(*kernel) for kernel in fields["kernels"])
    return Report(**fields)


def work() -> None:
    """Compile the jobs from the standard input; print one line of JSON per report."""
    jobs, dump = json.loads(sys.stdin.read())
    for program, arguments, chip in jobs:
        started = time.monotonic()
        kernels, moved, cycles, error = [], 0.0, None, None
        compiler = _compiler(chip)
        try:
            module, _, name = program.partition(":")
            function, shapes = getattr(importlib.import_module(module), name)(
                **arguments
            )
            compiled = compiler.compile_for(chip, function, *shapes)
            kernels = compiler.kernels(compiled, dump)
            moved = (compiled.cost_analysis() or {}).get("bytes accessed", 0.0)
            cycles = compiler.program_cycles(compiled)
        except Exception as exception:  # any error is the result of the job
            error = f"{type(exception).__name__}: {exception}"
        seconds = time.monotonic() - started
        report = Report(tuple(kernels), moved, cycles, seconds, error)
        print(json.dumps(report._asdict()), flush=True)
