"""Segments, ragged sequences and padding of the delta rule."""

import delta_rule_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrence_law import assert_law, run, small

from benchmarks.cases import delta_rule as cases
from pallas_kernels import delta_product, delta_rule

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


@pytest.mark.parametrize("steps", (1, 2))
@pytest.mark.parametrize("name", ("twelve_keys", "mixed_decay"))
def test_segments_are_separate_sequences(name, steps):
    inputs = cases.draw(name, small(N=steps))
    want = oracle.segmented(inputs, SEGMENTS)
    reference = run(inputs, "reference", segment_ids=SEGMENTS)
    assert_law(run(inputs, "xla", segment_ids=SEGMENTS), reference, want)


@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_only_padding_touches_nothing(implementation):
    inputs = cases.draw("random", small())
    got = run(inputs, implementation, segment_ids=np.full((2, 150), -1))
    np.testing.assert_array_equal(got["state"], inputs["initial_state"])
    np.testing.assert_array_equal(got["d_initial_state"], inputs["d_state"])
    for name in ("o", "d_q", "d_k", "d_v", "d_beta", "d_g"):
        assert not got[name].any(), name


@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_padding_may_hold_anything(implementation):
    inputs = cases.draw("random", small())
    clean = run(inputs, implementation, segment_ids=SEGMENTS)
    for name in ("q", "k", "v", "beta", "g"):
        inputs[name] = inputs[name].copy()
        inputs[name][SEGMENTS < 0] = np.nan
    padded = run(inputs, implementation, segment_ids=SEGMENTS)
    for name in clean:
        np.testing.assert_array_equal(padded[name], clean[name], err_msg=name)
        if not name.endswith("state"):
            assert not padded[name][SEGMENTS < 0].any(), name


@pytest.mark.parametrize("sequences", CU_SEQLENS)
@pytest.mark.parametrize("steps", (1, 2))
@pytest.mark.parametrize("name", ("twelve_keys", "mixed_decay"))
def test_ragged_sequences_have_states_of_their_own(name, steps, sequences):
    cu_seqlens = np.array(CU_SEQLENS[sequences])
    inputs = cases.draw(name, small(B=1, N=steps))
    states = cases.draw(name, small(B=len(cu_seqlens) - 1, T=1))
    inputs |= {n: states[n] for n in ("initial_state", "d_state")}
    want = oracle.ragged(inputs, cu_seqlens)
    reference = run(inputs, "reference", cu_seqlens=cu_seqlens)
    assert_law(run(inputs, "xla", cu_seqlens=cu_seqlens), reference, want)


@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_lengths_are_traced(implementation):
    """One compilation serves every division of the stream."""
    inputs = cases.draw("random", small(B=1))
    operands = [inputs[name] for name in ("q", "k", "v", "beta", "g")]
    compilations = []

    @jax.jit
    def f(cu_seqlens):
        compilations.append(cu_seqlens)
        return delta_product(
            *operands, cu_seqlens=cu_seqlens, implementation=implementation
        )

    for cu_seqlens in CU_SEQLENS.values():
        f(jnp.array(cu_seqlens))
    assert len(compilations) == 1


@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_no_tokens(implementation):
    inputs = cases.draw("random", small(T=0))
    got = run(inputs, implementation)
    assert got["o"].shape == (2, 0, 2, 12)
    np.testing.assert_array_equal(got["state"], inputs["initial_state"])
    np.testing.assert_array_equal(got["d_initial_state"], inputs["d_state"])


@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_state_continues_a_sequence(implementation):
    inputs = cases.draw("twelve_keys_gated", small(T=66))
    operands = [inputs[name] for name in ("q", "k", "v", "beta", "g")]

    def f(start, end, state):
        part = [x[:, start:end] for x in operands]
        return delta_product(*part, initial_state=state, implementation=implementation)

    whole, final = f(0, 66, None)
    first, state = f(0, 33, None)
    second, state = f(33, 66, state)
    halves = jnp.concatenate([first, second], axis=1)
    np.testing.assert_allclose(halves, whole, rtol=0, atol=4e-6)
    np.testing.assert_allclose(state, final, rtol=0, atol=4e-6)


@pytest.mark.parametrize("name", ("o", "d_v"))
@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_no_token_reaches_another_segment_or_row(name, implementation):
    """Bit for bit, values and gradients, in both directions of time."""
    inputs = cases.draw("twelve_keys_gated", small())
    before = run(inputs, implementation, segment_ids=SEGMENTS)[name]
    there = (0, np.flatnonzero(SEGMENTS[0] == 5))
    for operand in ("q", "k", "v", "beta", "g", "d_o"):
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
    inputs = cases.draw("twelve_keys", small(N=2))
    operands = [inputs[name] for name in ("q", "k", "v", "beta")]
    f = jax.jit(lambda *x: delta_product(*x, implementation=implementation)[0])
    before = f(*operands)
    for t in (1, 70, 149):
        later = [x.copy() for x in operands]
        for x in later:
            x[:, t:] *= 0.25
        after = f(*later)
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert (before[:, t] != after[:, t]).all()


def test_one_step_is_delta_rule():
    inputs = cases.draw("random", small())
    operands = [inputs[name] for name in ("q", "k", "v", "beta", "g")]
    q, k, v, beta, g = operands
    got = delta_rule(q, k[:, :, 0], v[:, :, 0], beta[:, :, 0], g)
    want = delta_product(*operands)
    jax.tree.map(np.testing.assert_array_equal, got, want)
