"""The table of block sizes, and how another size is tried."""

import json

import jax
import pytest

from benchmarks import block_sizes as tuner
from benchmarks.record import RESULTS
from pallas_kernels import platform, programs
from pallas_kernels.tpu import block_sizes

FOUND = json.loads((RESULTS / "block_sizes.json").read_text())["candidates"]


def test_the_table_has_the_best_of_the_candidates():
    assert json.loads(block_sizes.PATH.read_text()) == tuner.table(FOUND)
    for candidates in FOUND.values():
        sizes = [candidate["sizes"] for candidate in candidates]
        assert len(sizes) > 1 and all(set(size) == set(sizes[0]) for size in sizes)


def test_the_best_is_the_shortest_of_nearly_equals():
    cycles = {1: 104, 2: 101, 4: 100, 8: None}
    of = [{"sizes": {"n": n}, "cycles": {"v5e": c}} for n, c in cycles.items()]
    assert tuner.best(of, "v5e") == {"n": 2}


@pytest.mark.parametrize(
    ("operation", "arguments"),
    (
        ("delta_rule", {"H": 16, "K": 64, "V": 64}),
        ("linear_attention", {"H": 16, "K": 64, "V": 64}),
        ("selective_scan", {"E": 8 * 128, "N": 8}),
    ),
)
def test_another_size_is_tried(operation, arguments):
    most = block_sizes.of(next(k for k in FOUND if k.startswith(operation)))["heads"]

    def traced(T, **sizes):
        function, shapes = programs.with_block_sizes(operation, sizes, T=T, **arguments)
        with platform.interpreted_tpu():
            return str(jax.make_jaxpr(function)(*shapes))

    assert "grid=(1, 1, 2)" in traced(256)
    assert "grid=(1, 2, 3)" in traced(384, heads=most // 2)
