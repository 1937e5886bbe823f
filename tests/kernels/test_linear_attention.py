"""Gated linear attention against a float64 oracle on hard inputs, with gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_attention_oracle import gated_linear_attention as oracle
from recurrence_law import EPS, assert_law, error
from recurrence_law import run as run_operation

from benchmarks.cases import linear_attention as cases
from pallas_kernels import gated_linear_attention

run = partial(run_operation, operation=gated_linear_attention)
SMALL = cases.SHAPES["small"]


@pytest.mark.parametrize("decay", cases.DECAYS)
@pytest.mark.parametrize("name", cases.HARD)
def test_law_on_hard_inputs(name, decay):
    inputs = cases.draw(name, SMALL, decay)
    want = oracle(**inputs)
    reference = run(inputs, "reference")
    assert_law(run(inputs, "xla"), reference, want)
    for tensor in want:  # and the recurrence itself is right, up to its roundings
        if np.linalg.norm(want[tensor]) > 1e-30:
            assert error(reference[tensor], want[tensor]) <= 8 * EPS * 150**0.5, tensor


@pytest.mark.parametrize("implementation", ("xla", "reference"))
@pytest.mark.parametrize("decay", cases.DECAYS)
@pytest.mark.parametrize("name", ("gate", "resets", "mixed_decay"))
def test_float64_is_the_oracle(name, decay, implementation):
    inputs = cases.draw(name, SMALL._replace(T=75), decay)
    want = oracle(**inputs)
    with jax.enable_x64():
        inputs = {n: x.astype(np.float64) for n, x in inputs.items()}
        got = run(inputs, implementation)
    assert got.keys() == want.keys()
    for tensor in want:
        assert error(got[tensor], want[tensor]) < 1e-13, tensor


@pytest.mark.parametrize("decay", cases.DECAYS)
@pytest.mark.parametrize("T", (1, 2, 33))
def test_law_at_any_length(T, decay):
    inputs = cases.draw("mixed_decay", SMALL._replace(T=T), decay)
    assert_law(run(inputs, "xla"), run(inputs, "reference"), oracle(**inputs))


@pytest.mark.parametrize("decay", cases.DECAYS)
@pytest.mark.parametrize("chunk_size", (1, 5, 256))
def test_law_at_any_chunk_size(chunk_size, decay):
    inputs = cases.draw("mixed_decay", SMALL, decay)
    got = run(inputs, "xla", chunk_size=chunk_size)
    assert_law(got, run(inputs, "reference"), oracle(**inputs))


@pytest.mark.slow
@pytest.mark.parametrize("decay", cases.DECAYS)
@pytest.mark.parametrize("name", cases.HARD)
def test_law_on_long_sequences(name, decay):
    inputs = cases.draw(name, cases.Shape(B=1, T=2048, H=1, K=64, V=32), decay)
    assert_law(run(inputs, "xla"), run(inputs, "reference"), oracle(**inputs))


@pytest.mark.parametrize("decay", cases.DECAYS)
@pytest.mark.parametrize("name", ("gate", "mixed_decay"))
def test_bfloat16_is_within_its_rounding(name, decay):
    inputs = cases.draw(name, SMALL, decay)
    for n in ("q", "k", "v"):
        inputs[n] = inputs[n].astype(jnp.bfloat16)
    exact = {n: x.astype(np.float32) for n, x in inputs.items()}
    got, want = run(inputs, "xla"), run(exact, "reference")
    for n in want:
        assert error(got[n], want[n]) < 4 * float(jnp.finfo(jnp.bfloat16).eps), n


def test_a_decay_a_channel_may_be_that_of_the_head():
    inputs = cases.draw("mixed_decay", SMALL)
    want = run(inputs, "xla")
    inputs["g"] = np.repeat(inputs["g"][..., None], SMALL.K, axis=-1)
    got = run(inputs, "xla")
    got["d_g"] = got["d_g"].sum(-1)
    for tensor in want:
        assert error(got[tensor], want[tensor]) < 32 * EPS, tensor
