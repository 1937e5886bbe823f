"""Segments, ragged sequences and padding of the selective scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import selective_scan_oracle as oracle
from recurrence_law import assert_law
from selective_scan_law import run, small

from benchmarks.cases import selective_scan as cases
from pallas_kernels import selective_scan

TOKENS = ("x", "dt", "B", "C")

# Row 0: padding in front, behind and inside a segment, segments of length 1, an id
# that comes back. Row 1: one long segment over several chunks.
SEGMENTS = np.full((2, 150), 4)
SEGMENTS[0] = np.repeat(
    [-1, 7, 2, 5, -1, 5, -2, 2, 3, -1], [3, 40, 1, 1, 2, 50, 1, 20, 29, 3]
)

CU_SEQLENS = {
    "empty_ones": [0, 0, 40, 40, 41, 104, 140, 140],
    "all_tokens": [0, 1, 2, 64, 128, 149, 150, 150],
    "one_sequence": [0, 150, 150, 150, 150, 150, 150, 150],
    "no_tokens": [0, 0, 0, 0, 0, 0, 0, 0],
}


def arguments(inputs):
    """x, dt, A, B, C, D, in order."""
    return [inputs[name] for name in oracle.OPERANDS[:6]]


@pytest.mark.parametrize("name", ("random", "no_decay_repeated", "mixed"))
def test_segments_are_separate_sequences(name):
    inputs = cases.draw(name, small())
    want = oracle.segmented(inputs, SEGMENTS)
    reference = run(inputs, "reference", segment_ids=SEGMENTS)
    assert_law(run(inputs, "xla", segment_ids=SEGMENTS), reference, want)


@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_only_padding_touches_nothing(implementation):
    inputs = cases.draw("random", small())
    got = run(inputs, implementation, segment_ids=np.full((2, 150), -1))
    np.testing.assert_array_equal(got["state"], inputs["initial_state"])
    np.testing.assert_array_equal(got["d_initial_state"], inputs["d_state"])
    for name in ("y", "d_x", "d_dt", "d_B", "d_C", "d_A", "d_D"):
        assert not got[name].any(), name


@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_padding_may_hold_anything(implementation):
    inputs = cases.draw("random", small())
    clean = run(inputs, implementation, segment_ids=SEGMENTS)
    for name in (*TOKENS, "d_y"):
        inputs[name] = inputs[name].copy()
        inputs[name][SEGMENTS < 0] = np.nan
    padded = run(inputs, implementation, segment_ids=SEGMENTS)
    for name in clean:
        np.testing.assert_array_equal(padded[name], clean[name], err_msg=name)
        if name == "y" or name.removeprefix("d_") in TOKENS:
            assert not padded[name][SEGMENTS < 0].any(), name


@pytest.mark.parametrize("sequences", CU_SEQLENS)
@pytest.mark.parametrize("name", ("random", "mixed"))
def test_ragged_sequences_have_states_of_their_own(name, sequences):
    cu_seqlens = np.array(CU_SEQLENS[sequences])
    inputs = cases.draw(name, small(B=1))
    states = cases.draw(name, small(B=len(cu_seqlens) - 1, T=1))
    inputs |= {n: states[n] for n in ("initial_state", "d_state")}
    want = oracle.ragged(inputs, cu_seqlens)
    reference = run(inputs, "reference", cu_seqlens=cu_seqlens)
    assert_law(run(inputs, "xla", cu_seqlens=cu_seqlens), reference, want)


@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_lengths_are_traced(implementation):
    """One compilation serves every division of the stream."""
    inputs = cases.draw("random", small(B=1))
    compilations = []

    @jax.jit
    def f(cu_seqlens):
        compilations.append(cu_seqlens)
        return selective_scan(
            *arguments(inputs), cu_seqlens=cu_seqlens, implementation=implementation
        )

    for cu_seqlens in CU_SEQLENS.values():
        f(jnp.array(cu_seqlens))
    assert len(compilations) == 1


@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_no_tokens(implementation):
    inputs = cases.draw("random", small(T=0))
    got = run(inputs, implementation)
    assert got["y"].shape == (2, 0, 24)
    np.testing.assert_array_equal(got["state"], inputs["initial_state"])
    np.testing.assert_array_equal(got["d_initial_state"], inputs["d_state"])


@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_state_continues_a_sequence(implementation):
    inputs = cases.draw("mixed", small(T=66))
    x, dt, A, B, C, D = arguments(inputs)

    def f(start, end, state):
        part = [a[:, start:end] for a in (x, dt, B, C)]
        return selective_scan(
            *part[:2],
            A,
            *part[2:],
            D,
            initial_state=state,
            implementation=implementation,
        )

    whole, final = f(0, 66, None)
    first, state = f(0, 33, None)
    second, state = f(33, 66, state)
    halves = jnp.concatenate([first, second], axis=1)
    np.testing.assert_allclose(halves, whole, rtol=0, atol=4e-6)
    np.testing.assert_allclose(state, final, rtol=0, atol=4e-6)


@pytest.mark.parametrize("name", ("y", "d_x"))
@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_no_token_reaches_another_segment_or_row(name, implementation):
    """Bit for bit, values and gradients, in both directions of time."""
    inputs = cases.draw("random", small())
    before = run(inputs, implementation, segment_ids=SEGMENTS)[name]
    there = (0, np.flatnonzero(SEGMENTS[0] == 5))
    for operand in (*TOKENS, "d_y"):
        inputs[operand] = inputs[operand].copy()
        inputs[operand][there] *= 0.5
    after = run(inputs, implementation, segment_ids=SEGMENTS)[name]
    changed = np.zeros(SEGMENTS.shape, bool)
    changed[there] = True
    assert (before[changed] != after[changed]).all(-1).mean() > 0.9
    np.testing.assert_array_equal(before[~changed], after[~changed])


@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_the_future_does_not_change_the_past(implementation):
    """Bit for bit, also within a chunk."""
    x, dt, A, B, C, D = arguments(cases.draw("random", small()))
    f = jax.jit(
        lambda x, dt, B, C: selective_scan(
            x, dt, A, B, C, D, implementation=implementation
        )[0]
    )
    before = f(x, dt, B, C)
    for t in (1, 70, 149):
        later = [a.copy() for a in (x, dt, B, C)]
        for a in later:
            a[:, t:] *= 0.25
        after = f(*later)
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert (before[:, t] != after[:, t]).all()
