"""What the selective scan has beyond the laws of every recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrence_law import (
    BFLOAT16_EPS,
    arguments,
    assert_law,
    error,
    one_segment,
    run,
    with_gradients,
)
from recurrences import SCAN

from pallas_kernels import selective_scan


@pytest.mark.parametrize("sizes", ({"E": 1}, {"N": 1}, {"B": 1, "E": 1, "N": 1}))
def test_law_with_axes_of_one(sizes):
    inputs = SCAN.draw("mixed", **sizes)
    want, reference = SCAN.oracle(**inputs), run(SCAN, inputs, "reference")
    assert_law(run(SCAN, inputs, "xla"), reference, want)


def test_bfloat16_is_within_its_rounding():
    inputs = SCAN.draw("random")
    for name in ("x", "dt", "B", "C", "d_y"):
        inputs[name] = inputs[name].astype(jnp.bfloat16)
    exact = {name: x.astype(np.float32) for name, x in inputs.items()}
    got = run(SCAN, inputs, "xla")
    want = run(SCAN, exact, "reference", segment_ids=one_segment(exact))
    for name in want:  # results are rounded once
        assert error(got[name], want[name]) < BFLOAT16_EPS, name
    for name in ("state", "d_A", "d_initial_state"):  # these stay float32
        assert error(got[name], want[name]) < 2e-6, name


def test_without_d_nothing_passes_by():
    inputs = SCAN.draw("random")
    x, dt, A, B, C, D = (inputs[name] for name in SCAN.operands)
    with_d, state = selective_scan(x, dt, A, B, C, D)
    without, same = selective_scan(x, dt, A, B, C)
    np.testing.assert_allclose(with_d - D[None, None] * x, without, atol=1e-5)
    np.testing.assert_array_equal(state, same)


def test_backward_keeps_no_state_of_every_token():
    """Of T = 2048 tokens, no array holds T states; "reference" does."""
    T, E, N = 2048, 64, 16
    operands, names, gradients = arguments(SCAN.draw("random", B=1, T=T, E=E, N=N))

    def temporaries(implementation):
        options = (("implementation", implementation),)
        f = jax.jit(with_gradients, static_argnums=(0, 1, 2))
        program = f.lower(selective_scan, options, names, operands, gradients, {})
        return program.compile().memory_analysis().temp_size_in_bytes

    every_state = 4 * T * E * N
    assert temporaries("xla") < every_state
    assert temporaries("reference") > 2 * every_state


@pytest.mark.parametrize("sizes", ({"E": 384, "N": 16}, {"N": 32}))
def test_tpu_kernel_with_more_states_and_three_groups(sizes):
    """Also a grid step that holds all groups, of an odd number."""
    inputs = SCAN.draw("mixed", **SCAN.tpu | {"T": 130} | sizes)
    want, reference = SCAN.oracle(**inputs), run(SCAN, inputs, "reference")
    assert_law(run(SCAN, inputs, "pallas_tpu"), reference, want)
