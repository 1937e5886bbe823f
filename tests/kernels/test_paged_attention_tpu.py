"""The TPU kernel of paged attention, interpreted on a CPU and compiled for TPUs."""

from unittest import mock

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from paged_attention_law import assert_law, bfloat16_error, compiled
from paged_attention_oracle import paged_attention as oracle

from benchmarks.cases import paged_attention as cases
from benchmarks.cases.paged_attention import Heads, Room
from pallas_kernels import aot
from pallas_kernels.paged_attention import block_sizes, paged_attention, pallas_tpu
from pallas_kernels.paged_attention.operands import Masks, Operands
from pallas_kernels.platform import interpreted_tpu

ROOM = Room(S=4, Tq=16, P=20, pages_per_seq=6)
SIZES = (4, 2)  # queries an item, pages a block
MIXED = ((1, 70), (7, 40), (0, 9), (4, 4))
RAGGED = (MIXED, ((3, 0), (1, 16), (1, 17), (1, 96)), ((0, 0), (5, 3), (1, 1)), ())
TPU = {"sizes": SIZES, "implementation": "pallas_tpu"}
SMALL = Heads(Hq=4, Hkv=2, D=64, page=16)


@pytest.fixture(autouse=True)
def interpreted():
    """Copies happen when they are waited for, and unwritten memory is NaN."""
    mode = {"uninitialized_memory": "nan", "dma_execution_mode": "on_wait"}
    with interpreted_tpu(**mode):
        yield
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("masks", ({}, {"window": 20, "soft_cap": 3.0}), ids=str)
def test_law(masks):
    for sequences in RAGGED:
        arrays = cases.draw(sequences, SMALL, ROOM)
        got = compiled(**TPU, **masks)(**arrays)
        assert_law(got, oracle(**arrays, **masks), sequences)


@pytest.mark.parametrize(
    "heads, pages",
    [
        (SMALL, "int8"),
        (Heads(Hq=2, Hkv=2, D=256, page=32), "int8"),  # the heads of 16 bits
        (Heads(Hq=6, Hkv=2, D=128, page=16), None),
        (Heads(Hq=9, Hkv=9, D=64, page=16), "int8"),  # more heads than rows
    ],
    ids=str,
)
def test_law_of_other_heads_and_pages(heads, pages):
    arrays = cases.draw(MIXED, heads, ROOM, pages=pages)
    got = compiled(**TPU, window=30)(**arrays)
    assert_law(got, oracle(**arrays, window=30), MIXED)


@pytest.mark.parametrize(
    "heads, pages",
    [
        (SMALL, None),
        (Heads(Hq=4, Hkv=1, D=64, page=16), None),
        (Heads(Hq=4, Hkv=4, D=64, page=16), "float8_e4m3fn"),
        (Heads(Hq=4, Hkv=1, D=64, page=16), "float8_e5m2"),
    ],
    ids=str,
)
def test_bfloat16_errs_at_most_twice_the_reference(heads, pages):
    arrays = cases.draw(MIXED, heads, ROOM, dtype="bfloat16", pages=pages)
    want, _ = oracle(**arrays)
    of_reference = bfloat16_error(arrays, want, implementation="reference")
    assert bfloat16_error(arrays, want, **TPU) <= 2 * of_reference


def test_there_are_no_races():
    """Between copies, and between a copy and what reads it."""
    arrays = cases.draw(MIXED, SMALL, ROOM, pages="int8")
    with interpreted_tpu(detect_races=True, dma_execution_mode="eager"):
        got = compiled(**TPU)(**arrays)
    assert_law(got, oracle(**arrays), MIXED)


def test_only_pages_in_use_are_copied(monkeypatch):
    """The interpreter raises where a page is copied that there is not."""
    monkeypatch.setattr(block_sizes, "tpu", lambda _: SIZES)
    arrays = cases.draw(MIXED, SMALL, ROOM)
    table = arrays["page_table"]
    oldest = np.maximum(arrays["kv_lens"] - np.diff(arrays["cu_q_lens"]) - 19, 0)
    first = np.arange(ROOM.pages_per_seq)[None] * SMALL.page
    in_use = (first + SMALL.page > oldest[:, None]) & (
        first < arrays["kv_lens"][:, None]
    )
    in_use &= np.diff(arrays["cu_q_lens"])[:, None] > 0
    assert in_use.sum() < np.sum((table >= 0) & (table < ROOM.P))

    @jax.jit
    def attend(table):
        arrays_ = {k: v for k, v in arrays.items() if v is not None}
        scale = np.float32(SMALL.D**-0.5)
        none = {"k_scale": None, "v_scale": None, "scale": scale}
        operands = Operands(**jax.tree.map(jax.numpy.asarray, arrays_ | none))
        return pallas_tpu.attention(
            operands._replace(page_table=table), Masks(window=20, soft_cap=None)
        )

    got = attend(np.where(in_use, table, ROOM.P + 1).astype(np.int32))
    assert_law(got, oracle(**arrays, window=20), MIXED)
    s, i = np.argwhere(in_use)[-1]
    wrong = np.where(in_use, table, ROOM.P + 1).astype(np.int32)
    wrong[s, i] = ROOM.P + 1
    with pytest.raises(Exception, match="(?i)out.of.bounds"):
        jax.block_until_ready(attend(wrong))


COMPILED = [
    (Heads(32, 8, 128, 16), Room(32, 32, 1024, 64), "bfloat16", None),
    (Heads(32, 8, 128, 64), Room(8, 512, 512, 32), "float32", None),
    (Heads(8, 4, 64, 16), Room(16, 64, 512, 64), "float32", "int8"),
    (Heads(8, 2, 256, 256), Room(4, 64, 64, 16), "bfloat16", "int8"),
    (Heads(8, 1, 128, 32), Room(16, 16, 512, 64), "bfloat16", "float8_e4m3fn"),
    (Heads(8, 2, 128, 128), Room(4, 128, 64, 8), "float32", "float8_e5m2"),
]


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="needs libtpu")
@pytest.mark.parametrize("chip", aot.CHIPS)
def test_it_compiles(chip, compile_jobs):
    program = "pallas_kernels.programs:paged_attention"
    names = ("heads", "room", "dtype", "pages")
    jobs = [
        aot.Job(program, dict(zip(names, case, strict=True)), chip) for case in COMPILED
    ]
    # Without the estimate, which cannot model the layout copies around the kernel.
    for job, report in zip(jobs, compile_jobs(jobs, estimate=False), strict=True):
        assert report.error is None, f"{job}: {report.error}"
        assert len(report.kernels) == 1


def test_heads_are_divided_over_a_mesh():
    """Each device attends with its own, and has room for twice as many."""
    arrays = cases.draw(MIXED, SMALL, ROOM, pages="int8")
    want = compiled(**TPU)(**arrays)
    seen = []

    def sizes(operands):
        seen.append(operands.k_pages.shape[2])
        return SIZES

    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=auto)
    with jax.set_mesh(mesh), mock.patch.object(block_sizes, "tpu", sizes):
        got = jax.jit(
            lambda **arrays: paged_attention(
                **arrays, implementation="pallas_tpu", return_log_sum_exp=True
            )
        )(**arrays)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert set(seen) == {SMALL.Hkv // 2}
