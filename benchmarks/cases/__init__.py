"""Named shapes and named hard inputs of the kernels, for tests and benchmarks."""
