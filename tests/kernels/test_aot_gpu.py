"""The compiler for GPUs on a machine without one."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.record import RESULTS
from pallas_kernels import aot

HERE = "test_aot_gpu"


def product(size: int, name: str = "product"):
    """A program: the product of two matrices, 64 rows a block."""

    def body(x_ref, y_ref, o_ref, x, y, o, loaded):
        rows = pl.ds(jax.lax.axis_index("rows") * 64, 64)
        plgpu.copy_gmem_to_smem(x_ref.at[rows], x, loaded)
        plgpu.copy_gmem_to_smem(y_ref, y, loaded)
        plgpu.barrier_wait(loaded)

        def multiply(accumulator):
            plgpu.wgmma(accumulator, x, y)
            return accumulator[...]

        o[...] = pl.run_scoped(multiply, plgpu.ACC((64, size), jnp.float32))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o, o_ref.at[rows])
        plgpu.wait_smem_to_gmem(0)

    def call(x, y):
        return plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((size, size), jnp.float32),
            grid=(size // 64,),
            grid_names=("rows",),
            kernel_name=name,
            scratch_types=[
                plgpu.SMEM((64, size), jnp.bfloat16),
                plgpu.SMEM((size, size), jnp.bfloat16),
                plgpu.SMEM((64, size), jnp.float32),
                plgpu.Barrier(num_arrivals=2),
            ],
        )(x, y)

    x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    return call, (x, x)


def twice(size: int):
    """A program of two kernels."""
    first, shapes = product(size, "first")
    second, _ = product(size, "second")

    def call(x, y):
        return second(first(x, y).astype(x.dtype), y)

    return call, shapes


@pytest.fixture(autouse=True)
def find_this_module(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(RESULTS.parents[1] / "tests" / "kernels"))


@pytest.mark.skipif(not aot.available("h100"), reason="needs JAX for CUDA")
def test_reports_of_registers_and_shared_memory_come_in_order():
    # One twice, and one whose accumulator is too wide.
    sizes = (64, 64, 512, 256)
    jobs = [aot.Job(f"{HERE}:product", {"size": size}, "h100") for size in sizes]
    jobs.append(aot.Job(f"{HERE}:twice", {"size": 64}, "h100"))
    small, again, refused, large, two = aot.compile_jobs(jobs)
    assert again.kernels == small.kernels
    for report, size in ((small, 64), (large, 256)):
        assert report.error is None, report.error
        (kernel,) = report.kernels
        assert kernel.name == "product"
        assert kernel.shared >= 2 * (64 + size) * size + 4 * 64 * size
        assert kernel.stored == kernel.loaded == 0
        assert kernel.registers >= size // 2  # of the accumulator
    assert small.kernels[0].registers < large.kernels[0].registers <= 255
    assert refused.error is not None and not refused.kernels
    assert [kernel.name for kernel in two.kernels] == ["first", "second"]
    with pytest.raises(RuntimeError, match="no estimate"):
        _ = small.cycles


def test_a_chip_that_no_compiler_knows():
    with pytest.raises(ValueError, match="'a100'; choose one of v5e, .*, h100"):
        aot.compile_jobs([aot.Job(f"{HERE}:product", {"size": 64}, "a100")])


def test_without_a_compiler_it_says_how_to_get_one(monkeypatch):
    from pallas_kernels.aot import gpu

    monkeypatch.setattr(gpu, "available", lambda: False)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps .*jax-cuda13"):
        aot.compile_jobs([aot.Job(f"{HERE}:product", {"size": 64}, "h100")])
