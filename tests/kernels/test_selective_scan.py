"""The selective scan's values and gradients against a float64 oracle."""

import jax
import numpy as np
import pytest
import selective_scan_oracle as oracle
from recurrence_law import EPS, assert_law, error
from selective_scan_law import run, small

from benchmarks.cases import selective_scan as cases


@pytest.mark.parametrize("name", cases.HARD)
def test_law_on_hard_inputs(name):
    inputs = cases.draw(name, small())
    want = oracle.selective_scan(**inputs)
    reference = run(inputs, "reference")
    assert_law(run(inputs, "xla"), reference, want)
    for tensor in want:  # and the recurrence itself is right, up to its roundings
        if np.linalg.norm(want[tensor]) > 1e-30:
            bound = 8 * EPS * 150**0.5
            assert error(reference[tensor], want[tensor]) <= bound, tensor


@pytest.mark.parametrize("implementation", ("xla", "reference"))
@pytest.mark.parametrize("name", cases.HARD)
def test_float64_is_the_oracle(name, implementation):
    inputs = cases.draw(name, small(T=75))
    want = oracle.selective_scan(**inputs)
    with jax.enable_x64():
        inputs = {n: a.astype(np.float64) for n, a in inputs.items()}
        got = run(inputs, implementation)
    assert got.keys() == want.keys()
    for tensor in want:
        assert error(got[tensor], want[tensor]) < 1e-13, tensor


@pytest.mark.parametrize("T", (1, 2, 33))
def test_law_at_any_length(T):
    inputs = cases.draw("mixed", small(T=T))
    want = oracle.selective_scan(**inputs)
    assert_law(run(inputs, "xla"), run(inputs, "reference"), want)


@pytest.mark.parametrize("chunk_size", (1, 5, 128, 1000))
def test_law_at_any_chunk_size(chunk_size):
    inputs = cases.draw("mixed", small())
    want = oracle.selective_scan(**inputs)
    got = run(inputs, "xla", chunk_size=chunk_size)
    assert_law(got, run(inputs, "reference"), want)


@pytest.mark.parametrize("shape", ({"E": 1}, {"N": 1}, {"B": 1, "E": 1, "N": 1}))
def test_law_with_axes_of_one(shape):
    inputs = cases.draw("mixed", small(**shape))
    want = oracle.selective_scan(**inputs)
    assert_law(run(inputs, "xla"), run(inputs, "reference"), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.HARD)
def test_law_on_long_sequences(name):
    inputs = cases.draw(name, small(B=1, T=2048, E=24, N=16))
    want = oracle.selective_scan(**inputs)
    assert_law(run(inputs, "xla"), run(inputs, "reference"), want)
