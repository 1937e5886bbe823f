"""The TPU kernels of the recurrences, interpreted, against a float64 oracle."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrence_law import (
    EPS,
    assert_bfloat16,
    assert_law,
    error,
    narrowed,
    one_segment,
    run,
    with_states,
)
from recurrence_oracle import ragged, segmented
from recurrences import (
    A_CHANNEL,
    A_HEAD,
    ONE_STEP,
    SCAN,
    THREE_STEPS,
    over,
    over_inputs,
)

import pallas_kernels
from pallas_kernels.tpu import block_sizes, limits

OPERATIONS = (ONE_STEP, A_HEAD, A_CHANNEL, SCAN)
QUICK = tuple(op.usual for op in OPERATIONS)


def factor(op):
    """How many times the recurrence's error a kernel may have.

    The chunked form of the delta rule stays within 4 times by refining its solution;
    the kernel does not, and its chunks are longer.
    """
    return 8 if op.call is pallas_kernels.delta_product else 4


def results_alone(op, inputs, **options):
    """Run without a gradient; a single token has a kernel of its own for that."""
    options |= {"backward": False, "detect_races": True}
    return run(op, inputs, "pallas_tpu", **options)


def assert_float32(op, inputs, want=None, **options):
    want = op.oracle(**inputs) if want is None else want
    reference = run(op, inputs, "reference", **options)
    got = run(op, inputs, "pallas_tpu", **options)
    assert_law(got, reference, want, factor(op))


def assert_narrow(op, inputs, want=None, **options):
    inputs = narrowed(op, inputs)
    want = op.oracle(**inputs) if want is None else want
    options |= {"dtype": jnp.bfloat16}
    chunked = run(op, inputs, "xla", **options)
    assert_bfloat16(run(op, inputs, "pallas_tpu", **options), chunked, want)


# Two chunks, the last not full, and heads that do not fill a pack or a group.


@over_inputs(lambda op: op.hard, *OPERATIONS, quick=QUICK)
def test_float32_on_hard_inputs(op, name):
    inputs = op.draw(name, **op.tpu)
    assert_float32(op, inputs, segment_ids=one_segment(inputs))


@over(*OPERATIONS)
def test_segments_and_padding(op):
    inputs = op.draw(op.usual, **op.tpu)
    ids = np.repeat([0, 0, 3, -1, 3, 7, 8, -1], -(-op.tpu["T"] // 8))
    ids = ids[None, : op.tpu["T"]]
    inputs[op.typed_by][ids < 0] = np.nan
    assert_float32(op, inputs, segmented(op, inputs, ids), segment_ids=ids)


@over(*OPERATIONS)
def test_ragged_sequences_have_states_of_their_own(op):
    """Also empty ones, and tokens after the last; and of values wider than keys."""
    wide = {} if op is SCAN else {"H": 2, "V": 256}
    inputs = with_states(op.draw(op.usual, **op.tpu | wide), count=5)
    bounds = np.asarray([0, 3, 3, 135, 145, 145])
    assert_float32(op, inputs, ragged(op, inputs, bounds), cu_seqlens=bounds)


@over_inputs(lambda op: op.hard, ONE_STEP, A_HEAD, A_CHANNEL, quick=QUICK)
def test_bfloat16_errs_like_the_chunked_form(op, name):
    assert_narrow(op, op.draw(name, **op.tpu))


def test_bfloat16_of_two_groups_of_channels():
    assert_narrow(SCAN, SCAN.draw("mixed", **SCAN.tpu | {"E": 256}))


SINGLE = (
    *((op, name) for op in (ONE_STEP, THREE_STEPS) for name in ONE_STEP.exact),
    *((A_HEAD, name) for name in ("no_decay", "gate")),
    (A_CHANNEL, "mixed_decay"),
)


@pytest.mark.parametrize(("op", "name"), SINGLE, ids=str)
def test_a_single_token(op, name):
    """The step's kernel, of two groups of heads."""
    inputs = op.draw(name, **op.tpu | {"B": 2, "T": 1, "H": 16})
    want = op.oracle(**inputs)
    reference = run(op, inputs, "reference", backward=False)
    for tensor, got in results_alone(op, inputs).items():
        bound = 4 * max(error(reference[tensor], want[tensor]), EPS)
        assert error(got, want[tensor]) <= bound, tensor


def test_a_single_token_has_no_kernel_of_the_selective_scan():
    """But the name is known."""
    assert_float32(SCAN, SCAN.draw("mixed", **SCAN.tpu | {"B": 2, "T": 1}))


@contextmanager
def apart():
    """Every head, or group of channels, in a grid step of its own."""
    with block_sizes.trying({"heads": 1}), pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "GROUP", 1)
        yield


@pytest.mark.slow
@over(ONE_STEP, A_HEAD, A_CHANNEL)
def test_a_full_group_of_heads_beside_one_that_is_not(op):
    """The heads of a decay a channel have no groups but those that take turns."""
    sizes = op.tpu | {"T": 130, "K": 128, "V": 64}
    if op is not A_CHANNEL:
        assert_float32(op, op.draw(op.usual, **sizes | {"H": 9}))
        return
    with block_sizes.trying({"in_turns": 2}):
        assert_float32(op, op.draw(op.usual, **sizes | {"H": 3}))


@pytest.mark.slow
@over(ONE_STEP, A_HEAD, A_CHANNEL)
def test_bfloat16_of_keys_wider_than_values(op):
    """Of the delta rule five steps a token, whose keys do not fill a chunk."""
    sizes = op.tpu | {"H": 1, "K": 256, "V": 128}
    sizes |= {"T": 40, "N": 5} if op is ONE_STEP else {"T": 130}
    assert_narrow(op, op.draw(op.usual, **sizes))


@pytest.mark.slow
@over(*OPERATIONS)
def test_nothing_is_saved_without_a_gradient(op):
    """Neither that nor how many heads a grid step has changes a bit."""
    inputs = op.draw(op.usual, **op.tpu)
    ids = one_segment(inputs)
    want = run(op, inputs, "pallas_tpu", segment_ids=ids)
    with apart():
        alone = results_alone(op, inputs, segment_ids=ids)
    for name, x in alone.items():
        np.testing.assert_array_equal(x, want[name], err_msg=name)


def two_rows(op, name, **sizes):
    """Two rows of two heads, or of two groups of channels."""
    two = {"B": 2, "E": 256} if op is SCAN else {"B": 2, "H": 2}
    return op.draw(name, **op.tpu | two | sizes)


def devices():
    """A mesh of which an axis divides neither two rows nor two heads."""
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=auto)


def assert_same(op, got, want):
    """The same bits, but where devices' parts are summed, which rounds differently."""
    got = dict(got)
    for operand in op.operands:
        if {"data", "tensor"} - set(op.divided[operand]):
            name = f"d_{operand}"
            assert error(got.pop(name), want[name]) <= 4 * EPS, name
    for name, x in got.items():
        np.testing.assert_array_equal(x, want[name], err_msg=name)


@pytest.mark.slow
@over(*OPERATIONS)
def test_divided_among_devices(op):
    """That changes no bit.

    On one device there is no race between two rows, nor between two heads or groups of
    channels, which are apart in the grid.
    """
    inputs = two_rows(op, op.usual, T=100 if op is SCAN else 130)
    with apart():
        want = run(op, inputs, "pallas_tpu", detect_races=True)
        reference = run(op, inputs, "reference")
        assert_law(want, reference, op.oracle(**inputs), factor(op))
        with jax.set_mesh(devices()):
            assert_same(op, run(op, inputs, "pallas_tpu"), want)


@pytest.mark.slow
@over(*OPERATIONS)
def test_a_single_token_divided_among_devices(op):
    groups = {} if op is SCAN else {"H": 16}
    inputs = two_rows(op, op.usual, T=1, **groups)
    alone = results_alone(op, inputs)
    with jax.set_mesh(devices()):
        divided = results_alone(op, inputs)
    jax.tree.map(np.testing.assert_array_equal, divided, alone)


SINGLE_GRADIENTS = (
    *((ONE_STEP, name) for name in ("random", "twelve_keys_gated", "mixed_decay")),
    *((A_HEAD, name) for name in ("no_decay", "gate")),
    (A_CHANNEL, "mixed_decay"),
    (THREE_STEPS, "twelve_keys"),
    (SCAN, "mixed"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "name"), SINGLE_GRADIENTS, ids=str)
def test_the_gradient_of_a_single_token_divided_among_devices(op, name):
    """It is that of the chunk's kernel."""
    inputs = two_rows(op, name, T=1)
    want, reference = op.oracle(**inputs), run(op, inputs, "reference")
    with jax.set_mesh(devices()):
        got = run(op, inputs, "pallas_tpu")
    assert_law(got, reference, want, factor(op))


HEADS = "at most 32 heads of this size .* are 36; the nearest is 40"
MISFITS = (
    (ONE_STEP, dict(K=48), "head sizes .* but K is 48; the nearest is 64"),
    (ONE_STEP, dict(V=512), "but V is 512; the nearest is 256"),
    (ONE_STEP, dict(N=9), "at most 8 steps a token, but there are 9"),
    (ONE_STEP, dict(H=36), HEADS),
    (A_HEAD, dict(K=48), "head sizes .* but K is 48; the nearest is 64"),
    (A_HEAD, dict(H=36), HEADS),
    (SCAN, dict(E=200), "of 128 channels, but E is 200; the nearest is 256"),
    (SCAN, dict(N=12), "multiple of 8 states .* but N is 12; the nearest is 16"),
    (SCAN, dict(N=40), "at most 32 states per channel, but N is 40"),
)


@pytest.mark.parametrize(("op", "change", "message"), MISFITS, ids=str)
def test_shapes_it_cannot_take(op, change, message):
    with pytest.raises(NotImplementedError, match=message):
        run(op, op.draw(op.usual, **op.tpu | change), "pallas_tpu")


@over(*OPERATIONS)
def test_chunks_and_types_it_cannot_take(op):
    inputs = op.draw(op.usual, **op.tpu)
    with pytest.raises(NotImplementedError, match="has 128 tokens.* chunk_size is 64"):
        run(op, inputs, "pallas_tpu", chunk_size=64)
    with jax.enable_x64():
        inputs[op.typed_by] = inputs[op.typed_by].astype(np.float64)
        message = f"no float64, but {op.typed_by} has it"
        with pytest.raises(NotImplementedError, match=message):
            run(op, inputs, "pallas_tpu")
