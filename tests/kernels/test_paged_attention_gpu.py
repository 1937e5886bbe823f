"""The GPU kernel of paged attention, interpreted on a CPU and compiled for Hopper."""

import numpy as np
import pytest
from paged_attention_law import bfloat16_error, compiled
from paged_attention_oracle import paged_attention as oracle

from benchmarks.cases import paged_attention as cases
from benchmarks.cases.paged_attention import Heads, Room
from pallas_kernels import aot
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.platform import interpreted_gpu

GPU = {"implementation": "pallas_gpu"}
SMALL = Heads(Hq=4, Hkv=2, D=64, page=16)
ROOM = Room(S=4, Tq=8, P=24, pages_per_seq=14)
DECODE = ((1, 1), (1, 64), (1, 65), (1, 200))  # beside the ends of blocks of 64
MIXED = ((1, 70), (3, 40), (0, 9), (2, 2))
NO_KEYS = ((1, 0), (2, 1), (1, 17))


@pytest.fixture(autouse=True)
def interpreted():
    """Unwritten memory is NaN, and races raise."""
    with interpreted_gpu(uninitialized_memory="nan", detect_races=True):
        yield


def assert_law(arrays, sequences, **masks):
    """At most twice the error of the reference; log-sum-exps as of float32."""
    want, exact = oracle(**arrays, **masks)
    of_reference = bfloat16_error(arrays, want, implementation="reference", **masks)
    assert bfloat16_error(arrays, want, **GPU, **masks) <= 2 * of_reference
    _, lse = compiled(**GPU, **masks)(**arrays)
    lse, no_keys = np.asarray(lse), np.isneginf(exact)
    np.testing.assert_array_equal(np.isneginf(lse), no_keys)
    longest = max(keys for _, keys in sequences)
    difference = np.where(no_keys, 0.0, lse) - np.where(no_keys, 0.0, exact)
    assert np.abs(difference).max() <= 2e-6 * np.sqrt(longest)


@pytest.mark.parametrize("masks", ({}, {"window": 20, "soft_cap": 3.0}), ids=str)
@pytest.mark.parametrize("sequences", (DECODE, MIXED, NO_KEYS), ids=str)
def test_law(sequences, masks):
    arrays = cases.draw(sequences, SMALL, ROOM, dtype="bfloat16")
    assert_law(arrays, sequences, **masks)


@pytest.mark.parametrize(
    ("heads", "masks"),
    (
        (Heads(Hq=3, Hkv=3, D=128, page=32), {}),
        (Heads(Hq=9, Hkv=1, D=128, page=64), {}),  # rows that fill no tile
        # As many as there are; half a page a block, the first one wholly masked.
        (Heads(Hq=64, Hkv=1, D=64, page=128), {"window": 20}),
    ),
    ids=str,
)
def test_law_of_other_heads_and_pages(heads, masks):
    room = Room(S=3, Tq=4, P=18, pages_per_seq=8)
    sequences = ((1, 3), (1, 130), (1, 200))
    arrays = cases.draw(sequences, heads, room, dtype="bfloat16")
    assert_law(arrays, sequences, **masks)


def test_without_queries():
    arrays = cases.draw(((0, 5),), SMALL, ROOM, dtype="bfloat16")
    o, lse = compiled(**GPU)(**arrays)
    assert not np.any(np.asarray(o, np.float32)) and np.all(np.isneginf(lse))


@pytest.mark.parametrize(
    ("heads", "change", "message"),
    (
        (SMALL._replace(D=48), {}, "size 48, but the kernel is for 64, 128; 64 is"),
        (SMALL._replace(D=256), {}, "size 256, .*; 128 is the nearest"),
        (SMALL._replace(page=8), {}, "page has 8 tokens, .*; 16 is the nearest"),
        (SMALL._replace(Hq=130), {}, "65 query heads share keys, .* at most 64"),
        (SMALL, {"dtype": "float32"}, "q has dtype float32, .* for bfloat16; cast"),
        (SMALL, {"pages": "int8"}, "k_pages has dtype int8, .* for bfloat16"),
    ),
)
def test_what_it_cannot_take(heads, change, message):
    arrays = cases.draw(((1, 3),), heads, ROOM, **{"dtype": "bfloat16"} | change)
    with pytest.raises(NotImplementedError, match=message):
        paged_attention(**arrays, **GPU)


@pytest.mark.skipif(not aot.available("h100"), reason="needs JAX for CUDA")
def test_it_compiles_for_hopper_without_spills(compile_jobs):
    program = "pallas_kernels.programs:paged_attention"
    variants = (
        ((32, 8, 128, 16), (32, 32, 1024, 64), {}),
        ((8, 1, 64, 64), (4, 4, 64, 16), {"window": 100, "soft_cap": 5.0}),
        ((64, 1, 128, 256), (4, 64, 64, 16), {}),
    )
    jobs = [
        aot.Job(
            program,
            {"heads": heads, "room": room, "dtype": "bfloat16", **GPU, **masks},
            "h100",
        )
        for heads, room, masks in variants
    ]
    for job, report in zip(jobs, compile_jobs(jobs), strict=True):
        assert report.error is None, f"{job}: {report.error}"
        (kernel,) = report.kernels
        assert kernel.name == "paged_attention"
        assert kernel.stored == kernel.loaded == 0, kernel
