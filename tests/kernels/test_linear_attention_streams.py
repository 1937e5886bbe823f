"""Segments, ragged sequences and padding of gated linear attention."""

from functools import partial

import delta_rule_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_attention_oracle import gated_linear_attention as oracle
from recurrence_law import assert_law
from recurrence_law import run as run_operation

from benchmarks.cases import linear_attention as cases
from pallas_kernels import gated_linear_attention

run = partial(run_operation, operation=gated_linear_attention)
segmented = partial(delta_rule_oracle.segmented, oracle=oracle)
ragged = partial(delta_rule_oracle.ragged, oracle=oracle)

SMALL = cases.SHAPES["small"]
TOKENS = ("q", "k", "v", "g")

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

every_form = pytest.mark.parametrize(
    ("implementation", "decay"),
    [("xla", "scalar"), ("xla", "channel"), ("reference", "channel")],
)


@pytest.mark.parametrize("decay", cases.DECAYS)
@pytest.mark.parametrize("name", ("gate", "mixed_decay", "no_decay"))
def test_segments_are_separate_sequences(name, decay):
    inputs = cases.draw(name, SMALL, decay)
    want = segmented(inputs, SEGMENTS)
    reference = run(inputs, "reference", segment_ids=SEGMENTS)
    assert_law(run(inputs, "xla", segment_ids=SEGMENTS), reference, want)


@pytest.mark.parametrize("sequences", CU_SEQLENS)
@pytest.mark.parametrize("decay", cases.DECAYS)
@pytest.mark.parametrize("name", ("mixed_decay", "resets"))
def test_ragged_sequences_have_states_of_their_own(name, decay, sequences):
    cu_seqlens = np.array(CU_SEQLENS[sequences])
    inputs = cases.draw(name, SMALL._replace(B=1), decay)
    states = cases.draw(name, SMALL._replace(B=len(cu_seqlens) - 1, T=1), decay)
    inputs |= {n: states[n] for n in ("initial_state", "d_state")}
    want = ragged(inputs, cu_seqlens)
    reference = run(inputs, "reference", cu_seqlens=cu_seqlens)
    assert_law(run(inputs, "xla", cu_seqlens=cu_seqlens), reference, want)


@every_form
def test_only_padding_touches_nothing(implementation, decay):
    inputs = cases.draw("gate", SMALL, decay)
    got = run(inputs, implementation, segment_ids=np.full((2, 150), -1))
    np.testing.assert_array_equal(got["state"], inputs["initial_state"])
    np.testing.assert_array_equal(got["d_initial_state"], inputs["d_state"])
    for name in ("o", *(f"d_{n}" for n in TOKENS)):
        assert not got[name].any(), name


@every_form
def test_padding_may_hold_anything(implementation, decay):
    inputs = cases.draw("gate", SMALL, decay)
    clean = run(inputs, implementation, segment_ids=SEGMENTS)
    for name in TOKENS:
        inputs[name] = inputs[name].copy()
        inputs[name][SEGMENTS < 0] = np.nan
    padded = run(inputs, implementation, segment_ids=SEGMENTS)
    for name in clean:
        np.testing.assert_array_equal(padded[name], clean[name], err_msg=name)
        if not name.endswith("state"):
            assert not padded[name][SEGMENTS < 0].any(), name


@every_form
def test_lengths_are_traced(implementation, decay):
    """One compilation serves every division of the stream."""
    inputs = cases.draw("gate", SMALL._replace(B=1), decay)
    operands = [inputs[name] for name in TOKENS]
    compilations = []

    @jax.jit
    def f(cu_seqlens):
        compilations.append(cu_seqlens)
        return gated_linear_attention(
            *operands, cu_seqlens=cu_seqlens, implementation=implementation
        )

    for cu_seqlens in CU_SEQLENS.values():
        f(jnp.array(cu_seqlens))
    assert len(compilations) == 1


@every_form
def test_no_tokens(implementation, decay):
    inputs = cases.draw("gate", SMALL._replace(T=0), decay)
    got = run(inputs, implementation)
    assert got["o"].shape == (2, 0, 2, 12)
    np.testing.assert_array_equal(got["state"], inputs["initial_state"])
    np.testing.assert_array_equal(got["d_initial_state"], inputs["d_state"])


@every_form
def test_no_token_reaches_another_segment_or_row(implementation, decay):
    """Bit for bit, values and gradients, in both directions of time."""
    inputs = cases.draw("gate", SMALL, decay)
    before = run(inputs, implementation, segment_ids=SEGMENTS)
    there = (0, np.flatnonzero(SEGMENTS[0] == 5))
    for operand in (*TOKENS, "d_o"):
        inputs[operand] = inputs[operand].copy()
        inputs[operand][there] *= 0.5
    after = run(inputs, implementation, segment_ids=SEGMENTS)
    changed = np.zeros(SEGMENTS.shape, bool)
    changed[there] = True
    for name in ("o", "d_q", "d_k", "d_v", "d_g"):
        moved = before[name] != after[name]
        assert moved[changed].mean() > 0.9, name
        assert not moved[~changed].any(), name


@every_form
def test_the_future_does_not_change_the_past(implementation, decay):
    """Bit for bit, also within a chunk."""
    inputs = cases.draw("gate", SMALL, decay)
    operands = [inputs[name] for name in TOKENS]
    f = jax.jit(lambda *x: gated_linear_attention(*x, implementation=implementation)[0])
    before = f(*operands)
    for t in (1, 70, 149):
        later = [x.copy() for x in operands]
        for x in later:
            x[:, t:] *= 0.25
        after = f(*later)
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert (before[:, t] != after[:, t]).all()
