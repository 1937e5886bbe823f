"""The TPU compiler of the package `libtpu`.

It reports whether a kernel is legal for a chip, how much VMEM it uses, and how many
cycles its bundles take, simulated with a model of the copies between HBM and VMEM. The
number of cycles is the same on every run and useful for comparing two forms of a
kernel, but it is not a measurement.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.aot.lowering import lower_on

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
"""The topology of one chip of each generation."""

FLOPS_A_CYCLE = {"v5e": 2**17, "v5p": 2**18, "v6e": 2**19, "tpu7x": 2**19}
"""bfloat16 operations in all matrix units of a device; the peak / this is the clock."""

JOBS_A_PROCESS = None  # no limit

LIBTPU = pathlib.Path(__file__).parents[2] / ".cache" / "libtpu"
"""The directory in which libtpu is looked for first; it need not be installed in the
environment, where it would make JAX look for a TPU in every process."""

HOW_TO_INSTALL = (
    "Compiling for a TPU needs the package libtpu: pip install --no-deps "
    f"--target {LIBTPU} libtpu"
)

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.-]+) \(")
_COST = re.compile(r'"estimated_cycles":"(\d+)"')
_LOOP = re.compile(r" while\(.*condition=%([\w.-]+), body=%([\w.-]+)")
_ELSEWHERE = re.compile(r" (?:call|conditional)\(")
_TRIPS = re.compile(r"constant\((\d+)\)")
_CYCLES = re.compile(r'"bundle_analysis_data":\{"estimated_cycles":"(\d+)"')
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"')
_PLACES = re.compile(r"debug_locations\\22: \\22[^\\]*\\22")
_NAME = re.compile(r"^\s*(?:ROOT )?%([\w-]+)")


class Kernel(NamedTuple):
    """A Pallas kernel of a compiled program.

    Attributes:
        name: name given to `pallas_call`.
        cycles: estimated cycles of the whole grid; None if the compiler gives none.
        vmem: bytes of VMEM.
    """

    name: str
    cycles: int | None
    vmem: int


def roofline(chip: str, flops: float, moved: float) -> float:
    """A lower bound for the cycles that a device needs.

    Args:
        chip: one of `CHIPS`.
        flops: operations in bfloat16 products.
        moved: bytes between HBM and the core.
    """
    version = {"tpu7x": "TPU_7X"}.get(chip, f"TPU_{chip.upper()}")
    cores = 2 if chip == "v5p" else 1  # per device
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[version], cores)
    clock = info.bf16_ops_per_second / FLOPS_A_CYCLE[chip]
    return max(
        flops / FLOPS_A_CYCLE[chip], moved / (info.mem_bw_bytes_per_second / clock)
    )


def available() -> bool:
    """Whether libtpu is installed."""
    in_cache = (LIBTPU / "libtpu").is_dir()
    return in_cache or importlib.util.find_spec("libtpu") is not None


def version() -> str:
    """The version of the libtpu in use, to record with its figures.

    Raises:
        StopIteration: there is no libtpu.
    """
    path = [str(LIBTPU), *sys.path]
    packages = importlib.metadata.distributions(name="libtpu", path=path)
    return next(iter(packages)).version


def environment(dump: str, estimate: bool) -> dict[str, str]:
    """The environment variables of the compiling process.

    Args:
        dump: a directory that the estimator writes to.
        estimate: whether to estimate cycles.
    """
    added = {}
    if estimate:
        added["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={dump}"
    paths = [str(LIBTPU.parents[1]), str(LIBTPU), os.environ.get("PYTHONPATH", "")]
    added["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return ENVIRONMENT | added


def lower_for(chip: str, function, *shapes) -> jax.stages.Lowered:
    """Lower a function for one chip; this process must find libtpu.

    Args:
        function: to donate arguments, pass a jitted function.
    """
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    return lower_on(topology.devices[0], "tpu", function, *shapes)


def text_without_places(lower: Callable[[], jax.stages.Lowered]) -> str:
    """A lowered program, without the places in the source of its operations."""
    return _PLACES.sub("", lower().as_text())


def kernels(compiled, dump: str) -> list[Kernel]:
    """The Pallas kernels of a compiled program."""
    del dump
    reports = []
    for line in (compiled.as_text() or "").splitlines():
        if "tpu_custom_call" not in line:
            continue
        cycles, vmem, name = (p.search(line) for p in (_CYCLES, _VMEM, _NAME))
        reports.append(
            Kernel(
                name.group(1) if name else "",
                int(cycles.group(1)) if cycles else None,
                int(vmem.group(1)) if vmem else 0,
            )
        )
    return reports


def program_cycles(compiled) -> int | None:
    """Cycles of a whole program: its kernels, and XLA's operations by its cost model.

    Loops count as often as the bound in their condition. Copies have no estimate and
    count as 0. None if a kernel has no estimate, a loop has no bound, or the program
    branches or calls.
    """
    computations, entry, lines = {}, "", []
    for line in (compiled.as_text() or "").splitlines():
        header = _COMPUTATION.match(line)
        if header:
            lines = computations[header.group(2)] = []
            entry = header.group(2) if header.group(1) else entry
        else:
            lines.append(line)

    def cycles(name):
        total = 0
        for line in computations[name]:
            kernel, loop = "tpu_custom_call" in line, _LOOP.search(line)
            cost = (_CYCLES if kernel else _COST).search(line)
            if loop:
                bounds = _TRIPS.findall("\n".join(computations[loop.group(1)]))
                inner = cycles(loop.group(2))
                if len(bounds) != 1 or inner is None:
                    return None
                total += int(bounds[0]) * inner
            elif cost:
                total += int(cost.group(1))
            elif kernel or _ELSEWHERE.search(line):
                return None
        return total

    return cycles(entry) if entry else None
