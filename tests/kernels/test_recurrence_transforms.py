"""Every recurrence under JAX's transformations, in other types, and sharded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from recurrence_law import (
    BFLOAT16_EPS,
    arguments,
    error,
    one_segment,
    run,
    with_gradients,
)
from recurrences import (
    A_CHANNEL,
    A_HEAD,
    ONE_STEP,
    SCAN,
    SEGMENTS,
    TWO_STEPS,
    over,
    over_forms,
    over_inputs,
)


def drawn(op):
    """An input whose results differ little between programs."""
    return op.draw("random" if op is SCAN else op.usual)


def prepared(op, inputs, form, ids):
    """Arrays by name, and a function from them to results and gradients by name.

    The function's argument `change` transforms the operation before its gradient is
    taken.
    """
    given, names, gradients = arguments(inputs)
    arrays = given | dict(zip(names, gradients, strict=True)) | {"ids": ids}

    def f(arrays, change=lambda call: call):
        call = change(partial(op.call, implementation=form))
        operands = {name: arrays[name] for name in given}
        gradients = tuple(arrays[name] for name in names)
        streams = {"segment_ids": arrays["ids"]}
        return with_gradients(call, (), names, operands, gradients, streams)

    return f, arrays


def assert_close(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert error(np.asarray(got[name], np.float64), want[name]) < 2e-6, name


@over(TWO_STEPS, A_HEAD, A_CHANNEL, SCAN)
def test_vmap_and_scan_and_remat_change_nothing(op):
    """Over rows of which each has segments of its own."""
    inputs = drawn(op)
    want = run(op, inputs, "xla", segment_ids=SEGMENTS)
    f, arrays = prepared(op, inputs, "xla", SEGMENTS)
    weights = {name: arrays.pop(name) for name in op.weights}
    rows = {name: x[:, None] for name, x in arrays.items()}

    def joined(results):
        shared = {f"d_{name}" for name in weights}
        return {n: x.sum(0) if n in shared else x[:, 0] for n, x in results.items()}

    @jax.jit
    def mapped(rows, weights):
        return joined(jax.vmap(lambda row: f(row | weights))(rows))

    @jax.jit
    def scanned(rows, weights):
        def body(_, row):
            return None, f(row | weights, jax.checkpoint)

        return joined(jax.lax.scan(body, None, rows)[1])

    assert_close(mapped(rows, weights), want)
    assert_close(scanned(rows, weights), want)


@pytest.mark.parametrize("how", ("gspmd", "shard_map"))
@over_forms
@over(TWO_STEPS, A_HEAD, A_CHANNEL, SCAN)
def test_sharded_over_rows_and_heads(op, form, how):
    """Or channels, of the selective scan."""
    inputs = drawn(op)
    ids = one_segment(inputs)
    want = run(op, inputs, form, segment_ids=ids)
    f, arrays = prepared(op, inputs, form, ids)

    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    of = op.divided | {"ids": jax.sharding.PartitionSpec("data")}
    specs = {name: of[name.removeprefix("d_")] for name in arrays}
    places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    results = {name: NamedSharding(mesh, of[name.removeprefix("d_")]) for name in want}
    if how == "shard_map":
        out = {name: place.spec for name, place in results.items()}
        f = jax.shard_map(f, mesh=mesh, in_specs=(specs,), out_specs=out)
    sharded = jax.device_put(arrays, places)
    program = jax.jit(f, in_shardings=(places,)).lower(sharded).compile()
    got = program(sharded)
    for name in results.keys() - {f"d_{weight}" for weight in op.weights}:
        assert got[name].sharding.is_equivalent_to(results[name], got[name].ndim), name
    assert_close(got, want)
    # Rows and heads are independent: only sums of what they share cross devices.
    collectives = {"all-gather", "all-reduce", "all-to-all", "collective-permute"}
    for collective in collectives - ({"all-reduce"} if op.weights else set()):
        assert collective not in program.as_text()


BFLOAT16 = {
    TWO_STEPS.name: ("random", "silu_keys_gated", "twelve_keys_gated"),
    A_HEAD.name: ("gate", "mixed_decay"),
    A_CHANNEL.name: ("gate", "mixed_decay"),
}


@over_inputs(lambda op: BFLOAT16.get(op.name, ()))
def test_bfloat16_is_within_its_rounding(op, name):
    inputs = op.draw(name)
    for operand in op.narrow:
        narrow = inputs[operand].astype(jnp.bfloat16)
        inputs[operand] = narrow.astype(np.float32)
    got = run(op, inputs, "xla", dtype=jnp.bfloat16)
    want = run(op, inputs, "reference", segment_ids=one_segment(inputs))
    for tensor in want:
        assert error(got[tensor], want[tensor]) < 4 * BFLOAT16_EPS, tensor


@over_forms
@over(ONE_STEP, A_HEAD, A_CHANNEL, SCAN)
def test_dtypes_of_results(op, form):
    """An output has the type of the values, and a gradient that of its operand."""
    inputs = op.draw(op.bitwise[0], T=3)

    def types(**changed):
        narrow = {name: inputs[name].astype(dtype) for name, dtype in changed.items()}
        f, arrays = prepared(op, inputs | narrow, form, None)
        found = jax.eval_shape(f, arrays)
        return {name: x.dtype for name, x in found.items()}

    for dtype in (jnp.float32, jnp.bfloat16):
        got = types(**dict.fromkeys(op.narrow, dtype))
        assert got[op.output] == dtype and got["state"] == jnp.float32
        for operand in (*op.operands, "initial_state"):
            like = dtype if operand in op.narrow else jnp.float32
            assert got[f"d_{operand}"] == like, operand
    others = [name for name in op.narrow if name != op.typed_by]
    got = types(**dict.fromkeys(others, jnp.bfloat16))
    assert got[op.output] == jnp.float32  # whatever the others are


@over_forms
@over(ONE_STEP, A_HEAD, A_CHANNEL)
def test_scale(op, form):
    inputs = op.draw(op.usual)
    ids = one_segment(inputs)
    got = run(op, inputs, form, segment_ids=ids)
    scaled = run(op, inputs, form, segment_ids=ids, scale=3.0, backward=False)
    o = 3.0 * inputs["q"].shape[-1] ** 0.5 * got["o"]
    np.testing.assert_allclose(scaled["o"], o, rtol=1e-5)
    np.testing.assert_array_equal(scaled["state"], got["state"])


@pytest.mark.parametrize("precision", ("default", "high", jax.lax.Precision.HIGHEST))
@over(ONE_STEP, A_HEAD, A_CHANNEL)
def test_precision_is_accepted(op, precision):
    inputs = op.draw(op.usual)
    want = run(op, inputs, "reference", segment_ids=one_segment(inputs))
    operands, _, _ = arguments(inputs)
    o, _ = op.call(**operands, precision=precision)
    assert error(np.asarray(o), want["o"]) < 1e-5


@over(ONE_STEP, A_HEAD, A_CHANNEL)
def test_infinite_decay_forgets(op):
    """g = -inf is a reset, with finite gradients."""
    inputs = op.draw("twelve_keys_gated" if op is ONE_STEP else "gate")
    later = op.cut(inputs, slice(75, None))
    inputs["g"][:, 75] = -np.inf
    got = run(op, inputs, "xla", segment_ids=one_segment(inputs))
    later["g"][:, 0] = 0
    later["initial_state"] *= 0
    want = run(op, later, "xla")
    np.testing.assert_allclose(got["o"][:, 75:], want["o"], atol=1e-5)
    np.testing.assert_allclose(got["state"], want["state"], atol=1e-5)
    for name in got:
        assert np.isfinite(got[name]).all(), name
    assert not got["d_g"][:, 75].any()
