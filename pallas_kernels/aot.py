"""What the TPU compiler says of a kernel, on a machine without a TPU.

The `libtpu` package holds the real compiler. It says whether a kernel is legal for a
chip, how much VMEM it takes, and how many cycles its bundles take, simulated with a
model of the copies between HBM and VMEM: the same number on every run, good for
comparing two forms of a kernel, and not a measurement.

A program to compile is named, ``"module:function"``, because compilation happens in
another process: the estimate is switched on by an environment variable
before libtpu is loaded, and the compiler ends the process on what it cannot model. The
function takes JSON values and returns a function to compile and its arguments, as
`jax.ShapeDtypeStruct`.

All that is undocumented about libtpu is in this file: the flags, and the fields of the
compiled text.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
"""The topology of one chip of each generation."""

FLOPS_A_CYCLE = {"v5e": 2**17, "v5p": 2**18, "v6e": 2**19, "tpu7x": 2**19}
"""Of bfloat16 in all matrix units of a device; with the peak it gives the clock."""

LIBTPU = pathlib.Path(__file__).parents[1] / ".cache" / "libtpu"
"""Where libtpu is looked for besides the environment, which it need not be part of:
there it makes JAX look for a TPU in every process."""

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_CYCLES = re.compile(r'"bundle_analysis_data":\{"estimated_cycles":"(\d+)"')
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"')
_NAME = re.compile(r"^\s*(?:ROOT )?%([\w-]+)")


class Job(NamedTuple):
    """A program to compile: "module:function", its keyword arguments, and a chip."""

    program: str
    arguments: dict[str, Any]
    chip: str


class Kernel(NamedTuple):
    """A Pallas kernel of a compiled program.

    Attributes:
        name: as given to `pallas_call`.
        cycles: estimated, over the whole grid; None where the compiler says nothing.
        vmem: bytes of VMEM.
    """

    name: str
    cycles: int | None
    vmem: int


class Report(NamedTuple):
    """What compiling a job gave: its kernels, or the reason why there are none.

    Attributes:
        moved: bytes that the operations of the whole program read and write, kernels
          by their cost estimates; also where they stay in VMEM.
    """

    kernels: tuple[Kernel, ...]
    moved: float
    seconds: float
    error: str | None

    @property
    def cycles(self) -> int:
        """Of all kernels.

        Raises:
            RuntimeError: the job was not compiled, or a kernel has no estimate.
        """
        if self.error is not None:
            raise RuntimeError(self.error)
        known = [kernel.cycles for kernel in self.kernels]
        if not known or None in known:
            raise RuntimeError(f"There is no estimate of all kernels of {self}.")
        return sum(c for c in known if c is not None)


def roofline(chip: str, flops: float, moved: float) -> float:
    """Cycles that a device needs at least.

    Args:
        chip: of `CHIPS`.
        flops: of bfloat16 products.
        moved: bytes between HBM and the core.
    """
    version = {"tpu7x": "TPU_7X"}.get(chip, f"TPU_{chip.upper()}")
    cores = 2 if chip == "v5p" else 1  # of what is one device
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[version], cores)
    clock = info.bf16_ops_per_second / FLOPS_A_CYCLE[chip]
    return max(
        flops / FLOPS_A_CYCLE[chip], moved / (info.mem_bw_bytes_per_second / clock)
    )


def available() -> bool:
    """Whether there is a libtpu to compile with."""
    there = (LIBTPU / "libtpu").is_dir()
    return there or importlib.util.find_spec("libtpu") is not None


def libtpu_version() -> str:
    """Of the libtpu that is found; figures are of one version.

    Raises:
        StopIteration: there is none.
    """
    path = [str(LIBTPU), *sys.path]
    found = importlib.metadata.distributions(name="libtpu", path=path)
    return next(iter(found)).version


def compile_jobs(jobs: Iterable[Job], estimate: bool = True) -> list[Report]:
    """Compile every job, one after the other; a crash of the compiler is a report.

    Args:
        jobs: the programs.
        estimate: whether to estimate cycles too. The estimate cannot model all copies
          (strided ones, and tables in SMEM on some chips) and then ends the process,
          and it takes VMEM itself.

    Raises:
        ModuleNotFoundError: there is no libtpu.
    """
    if not available():
        raise ModuleNotFoundError(
            "Compiling for a TPU needs the package libtpu: pip install --no-deps "
            f"--target {LIBTPU} libtpu"
        )
    reports, waiting = [], list(jobs)
    while waiting:
        done = _compile_until_crash(waiting, estimate)
        reports += done
        waiting = waiting[len(done) :]
    return reports


def _compile_until_crash(jobs: Sequence[Job], estimate: bool) -> list[Report]:
    """The reports up to the first crash and of that, at least one."""
    with tempfile.TemporaryDirectory() as dump:
        environment = os.environ | ENVIRONMENT
        if estimate:
            flag = f"--xla_jf_dump_static_llo_profile_to={dump}"
            environment["LIBTPU_INIT_ARGS"] = flag
        paths = [str(LIBTPU.parents[1]), str(LIBTPU), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        started = time.monotonic()
        process = subprocess.run(
            [sys.executable, "-m", "pallas_kernels.aot"],
            input=json.dumps(jobs),
            env=environment,
            capture_output=True,
            text=True,
        )
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    reports = [_from_json(json.loads(line)) for line in lines]
    if len(reports) < len(jobs):
        seconds = time.monotonic() - started
        error = _crash(process.stderr, jobs[len(reports)])
        reports.append(Report((), 0.0, seconds, error))
    return reports


def _crash(stderr: str, job: Job) -> str:
    """What the compiler said before it ended the process, without the trace."""
    lines = stderr.splitlines()
    fatal = [i for i, line in enumerate(lines) if re.match(r"F\d{4} ", line)]
    said = lines[fatal[0] :][:3] if fatal else lines[-3:]
    return f"The compiler ended on {job}: {' '.join(said)}"


def _from_json(fields: dict[str, Any]) -> Report:
    kernels = tuple(Kernel(*kernel) for kernel in fields["kernels"])
    return Report(kernels, fields["moved"], fields["seconds"], fields["error"])


def _worker() -> None:
    """Compile the jobs of the standard input; a line of JSON a report."""
    for program, arguments, chip in json.loads(sys.stdin.read()):
        started = time.monotonic()
        kernels, moved, error = [], 0.0, None
        try:
            module, _, name = program.partition(":")
            function, shapes = getattr(importlib.import_module(module), name)(
                **arguments
            )
            compiled = compile_for(chip, function, *shapes)
            kernels = _kernels(compiled.as_text() or "")
            moved = (compiled.cost_analysis() or {}).get("bytes accessed", 0.0)
        except Exception as exception:  # whatever it is, it is this job's result
            error = f"{type(exception).__name__}: {exception}"
        report = Report(tuple(kernels), moved, time.monotonic() - started, error)
        print(json.dumps(report._asdict()), flush=True)


def compile_for(chip: str, function, *shapes):
    """Lower and compile a function for one chip; this process must find libtpu.

    Args:
        function: jitted already where arguments are donated.
    """
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    device = topology.devices[0]
    sharding = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    abstract = AbstractMesh(
        (1,),
        ("x",),
        axis_types=(AxisType.Auto,),
        abstract_device=AbstractDevice(
            device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu"
        ),
    )
    with jax.sharding.use_abstract_mesh(abstract):
        jitted = function if hasattr(function, "lower") else jax.jit(function)
        return jitted.lower(*shapes).compile()


def _kernels(text: str) -> list[Kernel]:
    """The Pallas kernels in a compiled program's text."""
    found = []
    for line in text.splitlines():
        if "tpu_custom_call" not in line:
            continue
        cycles, vmem, name = (p.search(line) for p in (_CYCLES, _VMEM, _NAME))
        found.append(
            Kernel(
                name.group(1) if name else "",
                int(cycles.group(1)) if cycles else None,
                int(vmem.group(1)) if vmem else 0,
            )
        )
    return found


if __name__ == "__main__":
    _worker()
