"""The compiler for TPUs on a machine without one, and what it says of our kernels."""

import inspect
import json

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from benchmarks import kernel_cycles
from benchmarks.record import RESULTS
from pallas_kernels import aot

pytestmark = pytest.mark.skipif(not aot.available(), reason="needs libtpu")
HERE = "test_aot"


def double(rows: int, block: int = 8):
    """A program: twice an array of `rows` rows, so many at a time."""

    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2

    def call(x):
        tile = pl.BlockSpec((block, 128), lambda i: (i, 0))
        return pl.pallas_call(
            kernel,
            name="double",
            grid=(rows // block,),
            in_specs=[tile],
            out_specs=tile,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        )(x)

    return call, (jax.ShapeDtypeStruct((rows, 128), jnp.float32),)


def double_elsewhere(rows: int):
    """As `double`, from other lines of this file."""
    names = {}
    exec("\n" * 50 + inspect.getsource(double), globals(), names)
    return names["double"](rows)


def end_the_process():
    """A program like those on which the compiler gives up."""
    import os

    os.abort()


@pytest.fixture(autouse=True)
def find_this_module(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(RESULTS.parents[1] / "tests" / "kernels"))


def test_reports_come_in_order_past_errors_and_crashes():
    jobs = [
        aot.Job(f"{HERE}:double", {"rows": 1024}, "v5e"),
        aot.Job(f"{HERE}:end_the_process", {}, "v5e"),
        aot.Job(f"{HERE}:double", {"rows": 12, "block": 3}, "v5e"),
        aot.Job(f"{HERE}:double", {"rows": 4096}, "v6e"),
    ]
    small, crashed, refused, large = aot.compile_jobs(jobs)
    (kernel,) = small.kernels
    assert kernel.name == "double"
    assert kernel.vmem >= 2 * 2 * 8 * 128 * 4  # two buffers of each side
    assert 0 < small.cycles < large.cycles
    assert crashed.error is not None and "end_the_process" in crashed.error
    assert refused.error is not None and "block" in refused.error.lower()
    with pytest.raises(RuntimeError, match="end_the_process"):
        _ = crashed.cycles


def test_roofline_is_of_the_slower_of_products_and_copies():
    assert aot.roofline("v5e", flops=2**17 * 100, moved=0) == pytest.approx(100)
    assert aot.roofline("v5e", flops=2**17, moved=820e9) == pytest.approx(
        1.5e9, rel=0.01
    )


LONG = 65_536  # tokens; their number changes the grid, but not a kernel's program
SMALL = {"H": 8, "K": 64, "V": 64}
WIDE = {"H": 8, "K": 256, "V": 256}
EXACT = {"T": 300, "dtype": "float32"}
RAGGED = {"T": 2000, "sequences": 3}
CHANNEL = {"decay": "channel"}
SHAPES = {
    "delta_rule": {
        "v5e": (SMALL | {"T": LONG},),
        "v5p": (EXACT | {"H": 3, "N": 3},),
        "v6e": (RAGGED | {"H": 8, "N": 2, "V": 64},),
        "tpu7x": (WIDE | {"T": LONG},),  # it has the least VMEM
    },
    "linear_attention": {
        "v5e": (
            SMALL | CHANNEL | {"T": LONG},
            WIDE | {"T": LONG},
            EXACT | {"H": 3},
        ),
        "v5p": (WIDE | CHANNEL | {"T": LONG}, EXACT | CHANNEL | {"H": 8, "K": 256}),
        "v6e": (
            SMALL | CHANNEL | {"T": LONG},
            SMALL | {"T": LONG},
            RAGGED | {"H": 8, "V": 64, "decay": None},
        ),
        "tpu7x": (WIDE | CHANNEL | {"T": LONG}, EXACT | CHANNEL | {"H": 8, "K": 256}),
    },
    "selective_scan": {
        "v5e": (RAGGED | {"E": 128, "N": 8},),
        "v5p": ({"T": LONG}, EXACT | {"E": 1024, "N": 32, "segments": 3}),
        "v6e": (RAGGED | {"E": 128, "N": 8},),
        "tpu7x": ({"T": LONG}, EXACT | {"E": 1024, "N": 32, "segments": 3}),
    },
}
"""Every chip compiles every operation, and some chip every shape. A decay a channel and
the selective scan, whose block sizes are not those of v5 on the others, are compiled in
every shape for one of both kinds. H = 16 heads with K = V = 128 in bfloat16 are
compiled with the estimates below, on v5e and v6e."""


@pytest.mark.slow
@pytest.mark.parametrize("operation", SHAPES)
def test_kernels_compile(operation, compile_jobs):
    program = f"pallas_kernels.programs:{operation}"
    assert SHAPES[operation].keys() == set(aot.CHIPS)
    jobs = [
        aot.Job(program, shape | {"backward": True}, chip)
        for chip, shapes in SHAPES[operation].items()
        for shape in shapes
    ]
    for job, report in zip(jobs, compile_jobs(jobs, estimate=False), strict=True):
        assert report.error is None, f"{job}: {report.error}"
        names = sorted(kernel.name for kernel in report.kernels)
        assert names == [f"{operation}_backward", f"{operation}_forward"], job


@pytest.mark.parametrize("variant", kernel_cycles.STEPS)
def test_a_decode_step_moves_its_states_once(variant, compile_jobs):
    """On all chips, in place.

    The kernel's bytes are by its own cost estimate: no copy may surround it.
    """
    jobs = [kernel_cycles.step_program(variant, chip) for chip in aot.CHIPS]
    for job, report in zip(jobs, compile_jobs(jobs, estimate=False), strict=True):
        assert report.error is None, f"{job}: {report.error}"
        assert [kernel.name for kernel in report.kernels] == ["token_step"]
        assert kernel_cycles.step_bytes(report) <= 1.1


def test_a_decode_step_of_few_heads_compiles(compile_jobs):
    """As the record says, if this program and this compiler are in it."""
    arguments = {"B": 2, "H": 3, "K": 64, "N": 8}
    job = aot.Job("pallas_kernels.programs:delta_rule_step", arguments, "v5e")
    (report,) = aot.compile_jobs([job], estimate=False)
    assert report.error is None, report.error
    (recorded,) = compile_jobs([job], estimate=False)
    assert recorded._replace(seconds=report.seconds) == report


def test_digests_are_of_programs_and_not_of_their_places():
    def digests(*arguments, chip="v5e"):
        return aot.digests([aot.Job(f"{HERE}:double", a, chip) for a in arguments])

    same = {"rows": 64}
    first, again, other = digests(same, same, {"rows": 128})
    assert first == again != other
    moved = aot.Job(f"{HERE}:double_elsewhere", same, "v5e")
    crashed = aot.Job(f"{HERE}:end_the_process", {}, "v5e")
    nothing = aot.Job(f"{HERE}:double", {"rows": 12, "none": 3}, "v5e")
    jobs = [nothing, crashed, moved, moved._replace(chip="v6e")]
    refused, gone, third, elsewhere = aot.digests(jobs)
    assert (refused, gone, third) == (None, None, first)
    assert elsewhere not in (None, first)
    assert aot.digests([moved], estimate=False) != [first]


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    (
        "delta rule",
        "delta rule, 2 steps a token",
        "delta rule, forward and backward",
        "linear attention, a head's decay, forward and backward",
        "linear attention, a channel's decay, forward and backward",
        "selective scan, forward and backward",
    ),
)
def test_cycles_are_not_above_the_committed_ones(variant, compile_jobs):
    committed = json.loads((RESULTS / "kernel_cycles.json").read_text())["estimated"]
    chips = ("v5e", "v6e")
    jobs = [kernel_cycles.program(variant, kernel_cycles.SHORT, chip) for chip in chips]
    for chip, report in zip(chips, compile_jobs(jobs), strict=True):
        now = report.cycles / kernel_cycles.SHORT / kernel_cycles.heads(variant, chip)
        before = committed[variant][chip][str(kernel_cycles.SHORT)]["cycles"]
        assert now <= 1.05 * before, (
            f"{variant} on {chip}: {now:.2f} cycles a token and head, committed are "
            f"{before:.2f}; make it faster again, or run python -m "
            "benchmarks.kernel_cycles and say why in the commit."
        )
