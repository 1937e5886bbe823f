"""Segments, ragged sequences and padding of every recurrence."""

import jax
import numpy as np
from recurrence_law import assert_law, one_segment, programs, run, with_states
from recurrence_oracle import ragged, segmented
from recurrences import (
    A_CHANNEL,
    A_HEAD,
    ONE_STEP,
    SCAN,
    SEGMENTS,
    over,
    over_forms,
    over_inputs,
)

CU_SEQLENS = {
    "empty_ones": [0, 0, 40, 40, 41, 104, 140, 140],
    "all_tokens": [0, 1, 2, 64, 128, 149, 150, 150],
    "one_sequence": [0, 150, 150, 150, 150, 150, 150, 150],
    "no_tokens": [0, 0, 0, 0, 0, 0, 0, 0],
}


@over_inputs(lambda op: op.streamed)
def test_segments_are_separate_sequences(op, name):
    inputs = op.draw(name)
    reference = run(op, inputs, "reference", segment_ids=SEGMENTS)
    got = run(op, inputs, "xla", segment_ids=SEGMENTS)
    assert_law(got, reference, segmented(op, inputs, SEGMENTS))


@over_inputs(lambda op: op.streamed)
def test_ragged_sequences_have_states_of_their_own(op, name):
    """One compilation serves every division of the stream."""
    inputs = with_states(op.draw(name, B=1), count=7)
    before = programs()
    for division, bounds in CU_SEQLENS.items():
        bounds = np.array(bounds)
        want = ragged(op, inputs, bounds)
        reference = run(op, inputs, "reference", cu_seqlens=bounds)
        got = run(op, inputs, "xla", cu_seqlens=bounds)
        try:
            assert_law(got, reference, want)
        except AssertionError as wrong:
            wrong.add_note(f"with {division}: {bounds}")
            raise
    assert programs() <= before + 2


@over_forms
@over_inputs(lambda op: op.bitwise)
def test_only_padding_touches_nothing(op, name, form):
    inputs = op.draw(name)
    got = run(op, inputs, form, segment_ids=np.full((2, 150), -1))
    np.testing.assert_array_equal(got.pop("state"), inputs["initial_state"])
    np.testing.assert_array_equal(got.pop("d_initial_state"), inputs["d_state"])
    for tensor in got:
        assert not got[tensor].any(), tensor


@over_forms
@over_inputs(lambda op: op.bitwise)
def test_padding_may_hold_anything(op, name, form):
    """Also the gradient for its outputs."""
    inputs = op.draw(name)
    clean = run(op, inputs, form, segment_ids=SEGMENTS)
    dirty = op.cut(inputs, slice(None))
    for operand in (*op.tokens, f"d_{op.output}"):
        if operand in dirty:
            dirty[operand][SEGMENTS < 0] = np.nan
    padded = run(op, dirty, form, segment_ids=SEGMENTS)
    for tensor in clean:
        np.testing.assert_array_equal(padded[tensor], clean[tensor], err_msg=tensor)
    for tensor in set(op.over_time) & padded.keys():
        assert not padded[tensor][SEGMENTS < 0].any(), tensor


@over_forms
@over(ONE_STEP, A_HEAD, A_CHANNEL, SCAN)
def test_no_tokens(op, form):
    inputs = op.draw(op.bitwise[0], T=0)
    got = run(op, inputs, form)
    ids = np.zeros((len(inputs["initial_state"]), 0), int)
    apart = run(op, inputs, form, segment_ids=ids)
    jax.tree.map(np.testing.assert_array_equal, apart, got)
    np.testing.assert_array_equal(got["state"], inputs["initial_state"])
    np.testing.assert_array_equal(got["d_initial_state"], inputs["d_state"])
    for tensor in set(op.over_time) & got.keys():
        like = inputs[f"d_{tensor}" if tensor == op.output else tensor[2:]]
        assert got[tensor].shape == like.shape, tensor
    for weight in op.weights:
        assert not got[f"d_{weight}"].any()


@over_forms
@over(ONE_STEP, A_HEAD, A_CHANNEL, SCAN)
def test_state_continues_a_sequence(op, form):
    """And its gradient passes on to the tokens before it."""
    inputs = op.draw(op.bitwise[0])
    inputs["initial_state"] *= 0
    whole = run(op, inputs, form, segment_ids=one_segment(inputs))
    first, second = (op.cut(inputs, part) for part in (slice(75), slice(75, None)))
    state = run(op, first, form)["state"]
    second["initial_state"] = state.astype(np.float32)
    after = run(op, second, form)
    first["d_state"] = after["d_initial_state"].astype(np.float32)
    before = run(op, first, form)
    joined = {
        "state": after["state"],
        "d_initial_state": before["d_initial_state"],
        **{
            f"d_{name}": before[f"d_{name}"] + after[f"d_{name}"] for name in op.weights
        },
    }
    for tensor in set(op.over_time) & whole.keys():
        joined[tensor] = np.concatenate([before[tensor], after[tensor]], axis=1)
    for tensor in (op.output, "state"):
        np.testing.assert_allclose(joined[tensor], whole[tensor], rtol=0, atol=4e-6)
    assert_law(joined, whole, op.oracle(**inputs))


@over_forms
@over_inputs(lambda op: op.bitwise)
def test_no_token_reaches_another_segment_or_row(op, name, form):
    """Bit for bit, values and gradients, in both directions of time."""
    inputs = op.draw(name)
    before = run(op, inputs, form, segment_ids=SEGMENTS)
    there = (0, np.flatnonzero(SEGMENTS[0] == 5))
    for operand in (*op.tokens, f"d_{op.output}"):
        if inputs[operand] is not None:
            inputs[operand][there] *= 0.5
    after = run(op, inputs, form, segment_ids=SEGMENTS)
    changed = np.zeros(SEGMENTS.shape, bool)
    changed[there] = True
    for tensor in set(op.over_time) & before.keys():
        moved = before[tensor] != after[tensor]
        assert moved[changed].all(-1).mean() > 0.9, tensor
        assert not moved[~changed].any(), tensor


@over_forms
@over_inputs(lambda op: op.bitwise)
def test_the_future_does_not_change_the_past(op, name, form):
    """Bit for bit, also within a chunk."""
    inputs = op.draw(name)
    ids = one_segment(inputs)
    before = run(op, inputs, form, segment_ids=ids)[op.output]
    for t in (1, 70, 149):
        later = op.cut(inputs, slice(None))
        for operand in op.tokens:
            if operand in later:
                later[operand][:, t:] *= 0.25
        after = run(op, later, form, segment_ids=ids)[op.output]
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert (before[:, t] != after[:, t]).all()


@over_forms
@over_inputs(lambda op: op.bitwise[:1])
def test_what_is_not_finite_stays_in_its_segment(op, name, form):
    """And in its head; in any operand, in the state before, and in gradients."""
    ids = np.stack([np.arange(150) // 15, SEGMENTS[0]])
    inputs = op.draw(name)
    broken = op.cut(inputs, slice(None))
    lost = np.zeros_like(ids, bool)
    for i, operand in enumerate([*op.tokens, op.tokens[0]][:5]):
        first, end = 30 * i + 20, 30 * i + 30  # a token of every second segment
        broken[operand][(0, first, *[0] * (broken[operand].ndim - 2))] = np.nan
        lost[0, first:end] = True
    broken["initial_state"][(1, *[0] * (broken["initial_state"].ndim - 1))] = np.inf
    lost[1] = ids[1] == 7  # the first
    end = np.array([True, False])  # whether the state after is lost

    def of(name, x):
        """What is lost of a tensor [B, T, ...]."""
        axes = op.axes(name.removeprefix("d_"), x.ndim)
        flags = lost.reshape(lost.shape + (1,) * (x.ndim - 2))
        if "H" not in axes:
            return np.broadcast_to(flags, x.shape)
        head = np.arange(x.shape[axes.index("H")]) == 0
        shape = [-1 if axis == "H" else 1 for axis in axes]
        return np.broadcast_to(flags & head.reshape(shape), x.shape)

    def of_state(x):
        """What is lost of the state after."""
        flags = end.reshape(-1, *[1] * (x.ndim - 1))
        if op.weights:  # the channels of a token are lost together
            return np.broadcast_to(flags, x.shape)
        head = (np.arange(x.shape[1]) == 0).reshape(1, -1, *[1] * (x.ndim - 2))
        return np.broadcast_to(flags & head, x.shape)

    d_output, d_state = f"d_{op.output}", "d_state"
    for inputs_, value in ((inputs, 0.0), (broken, np.nan)):
        inputs_[d_output][of(d_output, inputs_[d_output])] = value
        inputs_[d_state][of_state(inputs_[d_state])] = value

    want = run(op, inputs, form, segment_ids=ids)
    got = run(op, broken, form, segment_ids=ids)
    assert np.isnan(got[op.output][of(op.output, got[op.output])]).all()
    state = of_state(got["state"])
    assert np.isnan(got["state"][state]).all()
    np.testing.assert_array_equal(got["state"][~state], want["state"][~state])
    for tensor in op.over_time:
        kept = ~of(tensor, got[tensor])
        np.testing.assert_array_equal(
            got[tensor][kept], want[tensor][kept], err_msg=tensor
        )
    for weight in op.weights:
        np.testing.assert_array_equal(got[f"d_{weight}"], want[f"d_{weight}"])
