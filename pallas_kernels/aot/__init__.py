"""Compiling kernels ahead of time for TPUs and GPUs, on a computer without either.

The packages contain the real compilers. `tpu` reports whether a kernel is legal for a
chip, and how much VMEM and how many cycles it takes; `gpu` reports its registers and
shared memory, and how many bytes do not fit into registers.

A program to compile is given by name, ``"module:function"``, because another process
compiles it: environment variables have to be set before a compiler is loaded, and a
compiler ends the process on what it does not support. The function takes JSON values
and returns a function to compile and its arguments, as `jax.ShapeDtypeStruct`.

Everything undocumented about a compiler is in its file: flags, and the fields of its
output.
"""

from pallas_kernels.aot.gpu import CHIPS as GPUS
from pallas_kernels.aot.gpu import version as nvcc_version
from pallas_kernels.aot.jobs import (
    Job,
    Report,
    available,
    compile_jobs,
    digests,
    report_of,
)
from pallas_kernels.aot.tpu import CHIPS, roofline
from pallas_kernels.aot.tpu import version as libtpu_version

__all__ = [
    "CHIPS",
    "GPUS",
    "Job",
    "Report",
    "available",
    "compile_jobs",
    "digests",
    "libtpu_version",
    "nvcc_version",
    "report_of",
    "roofline",
]
