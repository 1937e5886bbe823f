"""The TPU kernels of the recurrences, interpreted, against a float64 oracle."""

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
    results_alone,
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
    TWO_STEPS,
    over,
    over_inputs,
)

import pallas_kernels
from pallas_kernels.tpu import block_sizes

OPERATIONS = (ONE_STEP, A_HEAD, A_CHANNEL, SCAN)
QUICK = tuple(op.usual for op in OPERATIONS)


def factor(op):
    """How many times the recurrence's error a kernel may have.

    The chunked form of the delta rule stays within 4 times by refining its solution;
    the kernel does not, and its chunks are longer.
    """
    return 8 if op.call is pallas_kernels.delta_product else 4


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
    """Also empty ones, and tokens after the last."""
    inputs = with_states(op.draw(op.usual, **op.tpu), count=5)
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
    """The step's kernel, and the gradient, which is that of the chunk's.

    The former of two groups of heads, of which a chunk's program would be long.
    """
    inputs = op.draw(name, **op.tpu | {"B": 2, "T": 1, "H": 16})
    want, reference = op.oracle(**inputs), run(op, inputs, "reference")
    for tensor, got in zip(("o", "state"), results_alone(op, inputs), strict=True):
        bound = 4 * max(error(reference[tensor], want[tensor]), EPS)
        assert error(np.asarray(got, np.float64), want[tensor]) <= bound, tensor
    two, reference, want = (two_heads(op, x) for x in (inputs, reference, want))
    assert_law(run(op, two, "pallas_tpu"), reference, want, factor(op))


def test_a_single_token_has_no_kernel_of_the_selective_scan():
    """But the name is known."""
    assert_float32(SCAN, SCAN.draw("mixed", **SCAN.tpu | {"B": 2, "T": 1}))


def two_heads(op, arrays):
    """The first two heads of inputs or results."""
    part = {}
    for name, x in arrays.items():
        axis = tuple(op.divided[name.removeprefix("d_")]).index("tensor")
        part[name] = x if x is None else np.take(x, (0, 1), axis)
    return part


def without_races(op, inputs):
    """Results and gradients; the selective scan's groups are apart in the grid."""
    with block_sizes.trying({"heads": 1} if op is SCAN else {}):
        return run(op, inputs, "pallas_tpu", detect_races=True)


@pytest.mark.slow
@pytest.mark.parametrize(("K", "V", "H"), ((128, 64, 9), (64, 256, 3)))
@over(ONE_STEP, A_HEAD, A_CHANNEL)
def test_keys_and_values_of_different_sizes(op, K, V, H):
    """Also a full group of heads beside one that is not, and several steps a token."""
    sizes = op.tpu | {"T": 130, "K": K, "V": V}
    assert_float32(op, op.draw(op.usual, **sizes | {"H": H}))
    narrow, T = (TWO_STEPS, 70) if op is ONE_STEP else (op, 130)
    assert_narrow(narrow, narrow.draw(op.usual, **sizes | {"T": T}))


@pytest.mark.slow
@over(ONE_STEP, A_HEAD, A_CHANNEL)
def test_no_race_in_two_rows_of_two_groups_of_heads(op):
    inputs = op.draw(op.bitwise[-1], **op.tpu | {"B": 2, "T": 130, "H": 16})
    reference, want = run(op, inputs, "reference"), op.oracle(**inputs)
    got = run(op, inputs, "pallas_tpu", detect_races=True)
    assert_law(got, reference, want, factor(op))


def two_rows(op, T, H):
    """Two rows of H heads, or of two groups of channels."""
    name, groups = op.bitwise[0], {"H": H}
    if op is SCAN:
        name, groups = "mixed", {"E": 256}
    return op.draw(name, **op.tpu | {"B": 2, "T": T} | groups)


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
    """Neither that nor that nothing is saved for a gradient changes a bit.

    On one device there is no race between two rows; nor between two groups of channels,
    which are apart in the grid.
    """
    inputs = two_rows(op, T=130, H=2)
    with block_sizes.trying({"heads": 1} if op is SCAN else {}):
        want = run(op, inputs, "pallas_tpu", detect_races=True)
        reference = run(op, inputs, "reference")
        assert_law(want, reference, op.oracle(**inputs), factor(op))
        with jax.set_mesh(devices()):
            assert_same(op, run(op, inputs, "pallas_tpu"), want)
            alone = results_alone(op, inputs)
    for name, x in zip((op.output, "state"), alone, strict=True):
        np.testing.assert_array_equal(x, want[name], err_msg=name)


@pytest.mark.slow
@over(*OPERATIONS)
def test_a_single_token_divided_among_devices(op):
    inputs = two_rows(op, T=1, H=16)
    few = inputs if op is SCAN else two_heads(op, inputs)

    def results():
        return run(op, few, "pallas_tpu"), results_alone(op, inputs)

    want, alone = results()
    with jax.set_mesh(devices()):
        got, alone_divided = results()
    assert_same(op, got, want)
    jax.tree.map(np.testing.assert_array_equal, alone_divided, alone)


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
