"""The GPU compiler of JAX's CUDA plugin, which needs no driver.

It reports whether a Mosaic GPU kernel is legal for a chip, how many registers a thread
uses, how many bytes it spills from them, and how much shared memory a block uses. It
does not estimate time.

JAX finds the plugin as `jax_plugins.xla_cuda13` on Python's path, and loads it for a
described topology even if `JAX_PLATFORMS` is cpu. The assembler, `ptxas`, is in the
package nvidia-cuda-nvcc, and the library of mathematical functions in nvidia-nvvm.
"""

import importlib.metadata
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.extend import source_info_util

from pallas_kernels.aot.lowering import lower_on

CHIPS = ("h100",)
JOBS_A_PROCESS = 1
"""A process assembles a kernel only once, and so does not report it in a later job."""

CUDA = pathlib.Path(__file__).parents[2] / ".cache" / "cuda"
"""The directory in which packages are looked for first; they need not be installed in
the environment, where they would make JAX look for a GPU in every process."""

HOW_TO_INSTALL = (
    "Compiling for a GPU needs packages of JAX's own version: pip install --no-deps "
    f"--target {CUDA} jax-cuda13-plugin=={jax.__version__} "
    f"jax-cuda13-pjrt=={jax.__version__} nvidia-cuda-nvcc nvidia-nvvm"
)

_ASSEMBLER = "nvidia/cu13/bin/ptxas"
_LIBRARY = "nvidia/cu13/nvvm/libdevice"
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"dynamic_shared_memory_size %c(\d+)_i32")

# The compiler's description of a device, as text of XLA's GpuTargetConfigProto, from
# NVIDIA's data sheet and occupancy tables. "Accelerated features": sm_90a, with WGMMA.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 12 }
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 85899345920
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
}
"""


class Kernel(NamedTuple):
    """A Mosaic GPU kernel of a compiled program.

    Attributes:
        name: name of the kernel's body.
        registers: registers per thread.
        stored, loaded: bytes per thread that are spilled from registers.
        shared: bytes of shared memory per block.
    """

    name: str
    registers: int
    stored: int
    loaded: int
    shared: int


def version() -> str:
    """The version of the assembler in use, to record with its figures.

    Raises:
        StopIteration: there is no assembler.
    """
    path = [str(CUDA), *sys.path]
    packages = importlib.metadata.distributions(name="nvidia-cuda-nvcc", path=path)
    return next(iter(packages)).version


def available() -> bool:
    """Whether there are a plugin, an assembler and its library to compile with."""
    parts = ("jax_plugins/xla_cuda13", _ASSEMBLER, _LIBRARY)
    return all(_find(part) for part in parts)


def _find(part: str) -> pathlib.Path | None:
    """The path of a file of the packages, in `CUDA` or in the environment."""
    places = (place / part for place in (CUDA, *map(pathlib.Path, sys.path)))
    return next((place for place in places if place.exists()), None)


def environment(dump: str, estimate: bool) -> dict[str, str]:
    """The environment variables of the compiling process.

    Args:
        dump: a directory that the compiler writes to.
        estimate: unused; there are no estimates.
    """
    del estimate
    assembler = _find(_ASSEMBLER)
    assert assembler is not None
    programs, toolkit = assembler.parents[:2]
    package = str(pathlib.Path(__file__).parents[2])
    paths = [package, str(CUDA), os.environ.get("PYTHONPATH", "")]
    flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_gpu_cuda_data_dir={toolkit}"]
    return {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PATH": os.pathsep.join([str(programs), os.environ.get("PATH", "")]),
        "XLA_FLAGS": " ".join(flags),
        "MOSAIC_GPU_DUMP_TO": dump,
    }


def lower_for(chip: str, function, *shapes) -> jax.stages.Lowered:
    """Lower a function for one chip; this process must find the plugin."""
    del chip  # there is only one
    topology = topologies.get_topology_desc(
        "h100", "cuda", target_config=_H100, topology="1x1x1"
    )
    return lower_on(topology.devices[0], "cuda", function, *shapes)


def text_without_places(lower: Callable[[], jax.stages.Lowered]) -> str:
    """A lowered program, without the places in the source of its operations.

    No program that this process lowers afterwards has them.
    """
    source_info_util.register_exclusion("")  # of every file
    return lower().as_text()


def kernels(compiled, dump: str) -> list[Kernel]:
    """The Mosaic GPU kernels of the one program that this process compiles.

    If several kernels of a program have one name, the shared memory is the largest.
    """
    reports, directory = [], pathlib.Path(dump)
    for path in sorted(directory.glob("*.ptxas")):
        output, name = path.read_text(), path.stem.rpartition("_")[0]
        spills, registers = _SPILLS.search(output), _REGISTERS.search(output)
        lowered = directory.glob(f"{name}_*.after_layout_inference.txt")
        sizes = [_SHARED.search(text.read_text()) for text in lowered]
        if spills is None or registers is None:
            raise RuntimeError(f"The output of ptxas for {name} is unknown: {output}")
        stored, loaded = map(int, spills.groups())
        shared = max((int(size.group(1)) for size in sizes if size), default=0)
        reports.append(Kernel(name, int(registers.group(1)), stored, loaded, shared))
    if not reports and "mosaic_gpu" in (compiled.as_text() or ""):
        raise RuntimeError("The program has GPU kernels, but ptxas reported none.")
    return reports


def program_cycles(compiled) -> None:
    """None: there is no estimate for a GPU."""
    del compiled
