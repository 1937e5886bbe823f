"""What the TPU kernel of the delta rule has beyond those of every recurrence."""

import jax.numpy as jnp
import numpy as np
import pytest
from recurrence_law import (
    assert_bfloat16,
    assert_law,
    error,
    narrowed,
    run,
    with_states,
)
from recurrence_oracle import ragged
from recurrences import ONE_STEP, THREE_STEPS, TWO_STEPS

SIZES = ONE_STEP.tpu


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ("twelve_keys_gated", "mixed_decay", "random", "twelve_keys")
)
def test_three_steps_a_token(name):
    inputs = THREE_STEPS.draw(name, **SIZES | {"T": 70})
    reference = run(THREE_STEPS, inputs, "reference")
    want = THREE_STEPS.oracle(**inputs)
    assert_law(run(THREE_STEPS, inputs, "pallas_tpu"), reference, want, factor=8)


@pytest.mark.slow
def test_bfloat16_of_two_groups_of_heads():
    """In one grid step."""
    sizes = SIZES | {"T": 130, "H": 16, "K": 128, "V": 128}
    inputs = narrowed(ONE_STEP, ONE_STEP.draw("twelve_keys_gated", **sizes))
    assert_narrow(ONE_STEP, inputs, ONE_STEP.oracle(**inputs))


@pytest.mark.slow
def test_ragged_sequences_of_two_steps_a_token():
    """And of keys wider than values."""
    sizes = SIZES | {"T": 150, "H": 2, "K": 128}
    inputs = with_states(TWO_STEPS.draw("twelve_keys_gated", **sizes), count=4)
    inputs, bounds = narrowed(TWO_STEPS, inputs), np.asarray([0, 70, 70, 90, 140])
    want = ragged(TWO_STEPS, inputs, bounds)
    assert_narrow(TWO_STEPS, inputs, want, cu_seqlens=bounds)


def assert_narrow(op, inputs, want, **options):
    options |= {"dtype": jnp.bfloat16}
    chunked = run(op, inputs, "xla", **options)
    assert_bfloat16(run(op, inputs, "pallas_tpu", **options), chunked, want)


def test_precision_and_operands_of_two_types():
    """HIGH is no less than HIGHEST, also of bfloat16; the wider type is multiplied."""
    inputs = narrowed(ONE_STEP, ONE_STEP.draw("twelve_keys", **SIZES | {"H": 1}))

    def kernel(inputs, **options):
        return run(ONE_STEP, inputs, "pallas_tpu", **options)

    plain = kernel(inputs)
    mixed = inputs | {"k": inputs["k"].astype(jnp.bfloat16)}
    same = plain.keys() - {"d_k"}  # which is rounded to the type of k
    for got in (kernel(inputs, precision="high"), kernel(mixed)):
        for tensor in same:
            np.testing.assert_array_equal(got[tensor], plain[tensor])
    narrow = kernel(inputs, dtype=jnp.bfloat16, precision="highest", backward=False)
    np.testing.assert_array_equal(narrow["state"], plain["state"])
    coarse = kernel(inputs, precision="default", backward=False)
    assert error(coarse["state"], plain["state"]) > 1e-4
