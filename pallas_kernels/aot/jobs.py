"""Jobs: programs to compile for a chip, in another process."""

import functools
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

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
    reports, waiting = [], _installed(jobs)
    while waiting:
        compiler = _compiler(waiting[0].chip)
        # An estimate takes up to 6 GiB, which the compiler does not free.
        most = 1 if estimate else compiler.JOBS_A_PROCESS
        new_reports = _compile_until_crash(_of_first(waiting)[:most], estimate)
        reports += new_reports
        waiting = waiting[len(new_reports) :]
    return reports


def digests(jobs: Iterable[Job], estimate: bool = True) -> list[str | None]:
    """A digest of all that the report of each job depends on.

    That is the program as it is lowered for the chip (without the places in the source
    that its operations come from), the versions of JAX and of the chip's compiler, and
    `estimate`: jobs of equal digests have equal reports, but for their seconds.
    Lowering takes a fraction of the time of compiling.

    Returns:
        64 hexadecimal digits for each job; None for a job that cannot be lowered, whose
        error `compile_jobs` reports.

    Raises:
        ModuleNotFoundError, ValueError: as `compile_jobs`.
    """
    found, waiting = [], _installed(jobs)
    while waiting:
        batch = _of_first(waiting)
        lines, _ = _work(batch, estimate, compiles=False)
        new = [line["digest"] for line in lines]
        found += new if len(new) == len(batch) else [*new, None]
        waiting = waiting[len(new) + (len(new) < len(batch)) :]
    return found


def _installed(jobs: Iterable[Job]) -> list[Job]:
    """The jobs, if there is a compiler for each."""
    jobs = list(jobs)
    for job in jobs:
        compiler = _compiler(job.chip)
        if not compiler.available():
            raise ModuleNotFoundError(compiler.HOW_TO_INSTALL)
    return jobs


def _of_first(jobs: list[Job]) -> list[Job]:
    """The first job, and those after it that the same compiler compiles."""
    compilers = [_compiler(job.chip) for job in jobs]
    others = (i for i, compiler in enumerate(compilers) if compiler != compilers[0])
    return jobs[: next(others, len(jobs))]


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
    started = time.monotonic()
    lines, stderr = _work(jobs, estimate, compiles=True)
    reports = [report_of(line, jobs[0].chip) for line in lines]
    if len(reports) < len(jobs):
        seconds = time.monotonic() - started
        error = _crash(stderr, jobs[len(reports)])
        reports.append(Report((), 0.0, None, seconds, error))
    return reports


def _work(
    jobs: Sequence[Job], estimate: bool, compiles: bool
) -> tuple[list[dict[str, Any]], str]:
    """What the compiling process says of jobs of one compiler, and its stderr.

    It says something of every job up to the first crash.
    """
    compiler = _compiler(jobs[0].chip)
    with tempfile.TemporaryDirectory() as dump:
        process = subprocess.run(
            [sys.executable, "-m", "pallas_kernels.aot"],
            input=json.dumps([jobs, dump, estimate, compiles]),
            env=os.environ | compiler.environment(dump, estimate),
            capture_output=True,
            text=True,
        )
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines], process.stderr


def _crash(stderr: str, job: Job) -> str:
    """The error message for a crash: the compiler's last words, without the trace."""
    lines = stderr.splitlines()
    fatal = [i for i, line in enumerate(lines) if re.match(r"F\d{4} ", line)]
    message = lines[fatal[0] :][:3] if fatal else lines[-3:]
    return f"The compiler ended the process on {job}: {' '.join(message)}"


def report_of(fields: Mapping[str, Any], chip: str) -> Report:
    """A report of a job for `chip` from its fields, as JSON keeps them."""
    kernel = _compiler(chip).Kernel
    kernels = tuple(kernel(*values) for values in fields["kernels"])
    return Report(**{**fields, "kernels": kernels})


def work() -> None:
    """Do the jobs from the standard input; print one line of JSON for each."""
    jobs, dump, estimate, compiles = json.loads(sys.stdin.read())
    for job in jobs:
        job = Job(*job)
        said = (
            _compile(job, dump)._asdict()
            if compiles
            else {"digest": _digest(job, estimate)}
        )
        print(json.dumps(said), flush=True)


def _compile(job: Job, dump: str) -> Report:
    """Compile a job in this process."""
    compiler, started = _compiler(job.chip), time.monotonic()
    kernels, moved, cycles, error = [], 0.0, None, None
    try:
        compiled = _lower(job).compile()
        kernels = compiler.kernels(compiled, dump)
        moved = (compiled.cost_analysis() or {}).get("bytes accessed", 0.0)
        cycles = compiler.program_cycles(compiled)
    except Exception as exception:  # any error is the result of the job
        error = f"{type(exception).__name__}: {exception}"
    return Report(tuple(kernels), moved, cycles, time.monotonic() - started, error)


def _digest(job: Job, estimate: bool) -> str | None:
    """The digest of a job, lowered in this process."""
    compiler = _compiler(job.chip)
    try:
        text = compiler.text_without_places(functools.partial(_lower, job))
    except Exception:  # an error that compiling reports
        return None
    parts = jax.__version__, compiler.version(), job.chip, str(estimate), text
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _lower(job: Job) -> jax.stages.Lowered:
    module, _, name = job.program.partition(":")
    program = getattr(importlib.import_module(module), name)
    function, shapes = program(**job.arguments)
    return _compiler(job.chip).lower_for(job.chip, function, *shapes)
