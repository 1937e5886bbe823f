"""What the compilers for TPUs and GPUs say of a kernel, on a machine without either.

The packages hold the real compilers. `tpu` says whether a kernel is legal for a chip,
how much VMEM it takes and how many cycles; `gpu` which registers and shared memory it
takes, and how many bytes do not fit into registers.

A program to compile is named, ``"module:function"``, because compilation happens in
another process: what is switched on by environment variables must be so before the
compiler is loaded, and a compiler ends the process on what it cannot do. The function
takes JSON values and returns a function to compile and its arguments, as
`jax.ShapeDtypeStruct`.

All that is undocumented about a compiler is in its file: flags, and the fields of what
it writes.
"""

from pallas_kernels.aot.gpu import CHIPS as GPUS
from pallas_kernels.aot.gpu import nvcc_version
from pallas_kernels.aot.jobs import Job, Report, available, compile_jobs
from pallas_kernels.aot.tpu import CHIPS, libtpu_version, roofline

__all__ = [
    "CHIPS",
    "GPUS",
    "Job",
    "Report",
    "available",
    "compile_jobs",
    "libtpu_version",
    "nvcc_version",
    "roofline",
]
