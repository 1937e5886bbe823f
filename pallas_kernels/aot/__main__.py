"""The other process: ``python -m pallas_kernels.aot`` compiles its standard input."""

from pallas_kernels.aot.jobs import work

work()
