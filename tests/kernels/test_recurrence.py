"""Values and gradients of every recurrence against a float64 oracle on hard inputs."""

import jax
import numpy as np
import pytest
from recurrence_law import EPS, arguments, assert_law, error, one_segment, run
from recurrences import (
    A_CHANNEL,
    A_HEAD,
    DELTA_RULES,
    ONE_STEP,
    SCAN,
    THREE_STEPS,
    TWO_STEPS,
    over,
    over_forms,
    over_inputs,
)


@over_inputs(lambda op: op.hard)
def test_law_on_hard_inputs(op, name):
    inputs = op.draw(name)
    want = op.oracle(**inputs)
    ids = one_segment(inputs)
    reference = run(op, inputs, "reference", segment_ids=ids)
    assert_law(run(op, inputs, "xla", segment_ids=ids), reference, want)
    for tensor in want:  # and the recurrence itself is right, up to its roundings
        if np.linalg.norm(want[tensor]) > 1e-30:
            bound = 8 * EPS * (150 * op.steps) ** 0.5
            assert error(reference[tensor], want[tensor]) <= bound, tensor


@over_forms
@over_inputs(lambda op: op.exact)
def test_float64_is_the_oracle(op, name, form):
    inputs = op.draw(name, T=75)
    want = op.oracle(**inputs)
    with jax.enable_x64():
        inputs = {
            n: x if x is None else x.astype(np.float64) for n, x in inputs.items()
        }
        got = run(op, inputs, form)
    assert got.keys() == want.keys()
    for tensor in want:
        bound = 1e-12 if op in DELTA_RULES else 1e-13
        assert error(got[tensor], want[tensor]) < bound, tensor


@pytest.mark.parametrize("T", (1, 2, 33))
@over(ONE_STEP, A_HEAD, A_CHANNEL, SCAN)
def test_law_at_any_length(op, T):
    """The recurrence has padding for the other tokens, and so is one program."""
    inputs = op.draw(op.usual)
    shorter = op.cut(inputs, slice(T))
    ids = one_segment(inputs)
    ids[:, T:] = -1
    reference = op.cut(run(op, inputs, "reference", segment_ids=ids), slice(T))
    assert_law(run(op, shorter, "xla"), reference, op.oracle(**shorter))


def test_law_in_several_groups_of_chunks():
    inputs = ONE_STEP.draw(ONE_STEP.usual, T=600)
    reference = run(ONE_STEP, inputs, "reference")
    assert_law(run(ONE_STEP, inputs, "xla"), reference, ONE_STEP.oracle(**inputs))


CHUNK_SIZES = (
    *((TWO_STEPS, size) for size in (1, 5, 128)),
    *((op, size) for op in (A_HEAD, A_CHANNEL) for size in (1, 5, 256)),
    *((SCAN, size) for size in (1, 5, 128, 1000)),
)


@pytest.mark.parametrize(("op", "chunk_size"), CHUNK_SIZES, ids=str)
def test_law_at_any_chunk_size(op, chunk_size):
    inputs = op.draw(op.usual)
    reference = run(op, inputs, "reference", segment_ids=one_segment(inputs))
    got = run(op, inputs, "xla", chunk_size=chunk_size)
    assert_law(got, reference, op.oracle(**inputs))


@over(ONE_STEP, A_HEAD, A_CHANNEL, SCAN)
def test_a_chunk_is_no_longer_than_the_sequence(op):
    """Its program is that of the next power of two."""
    operands, _, _ = arguments(op.draw(op.usual, T=37))

    def program(chunk_size):
        def call(operands):
            return op.call(**operands, implementation="xla", chunk_size=chunk_size)

        return jax.jit(call).lower(operands).as_text()

    assert program(1024) == program(64)


LONG = {
    "delta_product": {"H": 1, "K": 16, "V": 16},
    "gated_linear_attention": {"H": 1, "K": 64, "V": 32},
    "selective_scan": {"E": 24, "N": 16},
}


@pytest.mark.slow
@over_inputs(lambda op: op.hard, ONE_STEP, THREE_STEPS, A_HEAD, A_CHANNEL, SCAN)
def test_law_on_long_sequences(op, name):
    inputs = op.draw(name, B=1, T=2048, **LONG[op.call.__name__])
    want = op.oracle(**inputs)
    assert_law(run(op, inputs, "xla"), run(op, inputs, "reference"), want)
