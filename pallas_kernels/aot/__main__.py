"""The compiling process: ``python -m pallas_kernels.aot`` reads jobs from stdin."""

from pallas_kernels.aot.jobs import work

work()
