"""The delta rule's values and gradients against a float64 oracle on hard inputs."""

import delta_rule_oracle as oracle
import jax
import numpy as np
import pytest
from recurrence_law import EPS, assert_law, error, run, small

from benchmarks.cases import delta_rule as cases


@pytest.mark.parametrize("steps", (1, 2, 3))
@pytest.mark.parametrize("name", cases.HARD)
def test_law_on_hard_inputs(name, steps):
    inputs = cases.draw(name, small(N=steps))
    want = oracle.delta_product(**inputs)
    reference = run(inputs, "reference")
    assert_law(run(inputs, "xla"), reference, want)
    for tensor in want:  # and the recurrence itself is right, up to its roundings
        if np.linalg.norm(want[tensor]) > 1e-30:
            bound = 8 * EPS * (150 * steps) ** 0.5
            assert error(reference[tensor], want[tensor]) <= bound, tensor


@pytest.mark.parametrize("implementation", ("xla", "reference"))
@pytest.mark.parametrize("steps", (1, 3))
@pytest.mark.parametrize("name", ("random", "twelve_keys", "mixed_decay"))
def test_float64_is_the_oracle(name, steps, implementation):
    inputs = cases.draw(name, small(N=steps, T=75))
    want = oracle.delta_product(**inputs)
    with jax.enable_x64():
        inputs = {
            n: x if x is None else x.astype(np.float64) for n, x in inputs.items()
        }
        got = run(inputs, implementation)
    assert got.keys() == want.keys()
    for tensor in want:
        assert error(got[tensor], want[tensor]) < 1e-12, tensor


@pytest.mark.parametrize("T", (1, 2, 33, 600))  # the last in several groups
def test_law_at_any_length(T):
    inputs = cases.draw("twelve_keys_gated", small(T=T))
    want = oracle.delta_product(**inputs)
    assert_law(run(inputs, "xla"), run(inputs, "reference"), want)


@pytest.mark.parametrize("chunk_size", (1, 5, 128))
def test_law_at_any_chunk_size(chunk_size):
    inputs = cases.draw("twelve_keys_gated", small(N=2))
    want = oracle.delta_product(**inputs)
    got = run(inputs, "xla", chunk_size=chunk_size)
    assert_law(got, run(inputs, "reference"), want)


@pytest.mark.slow
@pytest.mark.parametrize("steps", (1, 3))
@pytest.mark.parametrize("name", cases.HARD)
def test_law_on_long_sequences(name, steps):
    inputs = cases.draw(name, small(B=1, T=2048, N=steps, H=1, K=16, V=16))
    want = oracle.delta_product(**inputs)
    assert_law(run(inputs, "xla"), run(inputs, "reference"), want)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ("one_key", "three_keys", "twelve_keys", "reflections", "mixed_decay")
)
def test_law_on_8192_tokens(name):
    inputs = cases.draw(name, small(B=1, T=8192, H=1, K=16, V=16))
    want = oracle.delta_product(**inputs)
    assert_law(run(inputs, "xla"), run(inputs, "reference"), want)


@pytest.mark.parametrize("name", ("twelve_keys", "three_keys", "random"))
def test_recurrence_is_accurate_on_512_tokens(name):
    """What the law is measured by: below 1e-5 with three steps a token."""
    inputs = cases.draw(name, small(B=1, T=512, N=3))
    want = oracle.delta_product(**inputs)
    got = run(inputs, "reference")
    assert max(error(got[t], want[t]) for t in ("o", "state")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("steps", (1, 2))
@pytest.mark.parametrize("name", cases.HARD)
def test_law_on_wide_heads(name, steps):
    inputs = cases.draw(name, small(B=1, T=700, N=steps, K=128, V=64))
    want = oracle.delta_product(**inputs)
    assert_law(run(inputs, "xla"), run(inputs, "reference"), want)
