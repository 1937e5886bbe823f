"""The TPU kernel of the delta rule, interpreted: values against a float64 oracle."""

from functools import partial

import delta_rule_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrence_law import (
    EPS,
    assert_bfloat16,
    assert_law,
    assert_same_on_a_mesh,
    error,
    in_float64,
    narrowed,
    results_alone,
)
from recurrence_law import run as run_operation

import pallas_kernels
from benchmarks.cases import delta_rule as cases
from pallas_kernels import platform

INPUTS = ("q", "k", "v", "beta", "g", "initial_state")
run = partial(run_operation, implementation="pallas_tpu")
# The chunked form stays within 4 times the recurrence's error by refining its solution;
# the kernel does not, and its chunks are longer.
assert_float32 = partial(assert_law, factor=8)


def shape(T=200, N=1, H=3, K=64, V=64, B=1):
    """Two chunks, the last not full, and heads that do not fill a pack."""
    return cases.Shape(B, T, N, H, K, V)


@pytest.mark.parametrize("name", cases.HARD)
def test_float32_on_hard_inputs(name):
    inputs = cases.draw(name, shape())
    want = oracle.delta_product(**inputs)
    assert_float32(run(inputs), run(inputs, implementation="reference"), want)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ("twelve_keys_gated", "mixed_decay", "random", "twelve_keys")
)
def test_three_steps_a_token(name):
    inputs = cases.draw(name, shape(T=70, N=3))
    want = oracle.delta_product(**inputs)
    assert_float32(run(inputs), run(inputs, implementation="reference"), want)


@pytest.mark.parametrize("name", cases.HARD)
def test_bfloat16_errs_like_the_chunked_form(name):
    inputs = narrowed(cases.draw(name, shape()))
    want = oracle.delta_product(**inputs)
    chunked = run(inputs, implementation="xla", dtype=jnp.bfloat16)
    assert_bfloat16(run(inputs, dtype=jnp.bfloat16), chunked, want)


@pytest.mark.slow
@pytest.mark.parametrize(("K", "V", "H"), ((128, 64, 9), (64, 256, 3)))
def test_keys_and_values_of_different_sizes(K, V, H):
    """Groups of heads of which one is full, and bfloat16 with steps of a token."""
    inputs = cases.draw("twelve_keys_gated", shape(T=140, K=K, V=V, H=H))
    want = oracle.delta_product(**inputs)
    assert_float32(run(inputs), run(inputs, implementation="reference"), want)
    inputs = narrowed(cases.draw("twelve_keys_gated", shape(T=70, K=K, V=V, N=2)))
    want = oracle.delta_product(**inputs)
    chunked = run(inputs, implementation="xla", dtype=jnp.bfloat16)
    assert_bfloat16(run(inputs, dtype=jnp.bfloat16), chunked, want)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", (dict(H=16, K=128, V=128, T=130), dict(H=3, N=5, T=40))
)
def test_bfloat16_of_other_sizes(sizes):
    """Two groups of heads in a grid step, and a chunk that its keys do not fill."""
    inputs = narrowed(cases.draw("twelve_keys_gated", shape(**sizes)))
    want = oracle.delta_product(**inputs)
    chunked = run(inputs, implementation="xla", dtype=jnp.bfloat16)
    assert_bfloat16(run(inputs, dtype=jnp.bfloat16), chunked, want)


def test_precision_and_operands_of_two_types():
    """HIGH is no less than HIGHEST, also of bfloat16; the wider type is multiplied."""
    inputs = narrowed(cases.draw("twelve_keys", shape(H=1)))
    plain = run(inputs)
    mixed = inputs | {"k": jnp.asarray(inputs["k"], jnp.bfloat16)}
    same = plain.keys() - {"d_k"}  # which is rounded to the type of k
    for got in (run(inputs, precision="high"), run(mixed)):
        for tensor in same:
            np.testing.assert_array_equal(got[tensor], plain[tensor])
    narrow = run(inputs, dtype=jnp.bfloat16, precision="highest")
    np.testing.assert_array_equal(narrow["state"], plain["state"])
    coarse = run(inputs, precision="default")
    assert error(coarse["state"], plain["state"]) > 1e-4


@pytest.mark.parametrize("N", (1, 3))
@pytest.mark.parametrize("name", ("twelve_keys", "random", "mixed_decay"))
def test_a_single_token(name, N):
    """The gradient, which is that of the chunk's, and the step's kernel.

    The latter of two groups of heads, of which a chunk's program would be long.
    """
    inputs = cases.draw(name, shape(T=1, N=N, B=2))
    reference = run(inputs, implementation="reference")
    assert_float32(run(inputs), reference, oracle.delta_product(**inputs))
    inputs = cases.draw(name, shape(T=1, N=N, H=16, B=2))
    want = oracle.delta_product(**inputs)
    reference = run(inputs, implementation="reference")
    o, state = results_alone(inputs, pallas_kernels.delta_product)
    for tensor, got in (("o", o), ("state", state)):
        bound = 4 * max(error(reference[tensor], want[tensor]), EPS)
        assert error(np.asarray(got, np.float64), want[tensor]) <= bound, tensor


def test_segments_and_padding():
    inputs = cases.draw("twelve_keys_gated", shape())
    ids = np.repeat([0, 0, 3, -1, 3, 7, 8, -1], 25)[None]
    inputs["v"][ids < 0] = np.nan
    reference = run(inputs, implementation="reference", segment_ids=ids)
    want = in_float64(inputs, segment_ids=ids)
    assert_float32(run(inputs, segment_ids=ids), reference, want)


def test_ragged_sequences_have_states_of_their_own():
    inputs = cases.draw("twelve_keys_gated", shape(H=2))
    bounds = np.asarray([0, 3, 3, 140, 180, 180])
    rng = np.random.default_rng(0)
    for name in ("initial_state", "d_state"):
        inputs[name] = rng.standard_normal((5, 2, 64, 64)).astype(np.float32)
    reference = run(inputs, implementation="reference", cu_seqlens=bounds)
    want = in_float64(inputs, cu_seqlens=bounds)
    assert_float32(run(inputs, cu_seqlens=bounds), reference, want)


@pytest.mark.slow
def test_ragged_sequences_of_two_steps_a_token():
    inputs = narrowed(cases.draw("twelve_keys_gated", shape(T=150, H=2, N=2)))
    bounds = np.asarray([0, 70, 70, 90, 140])
    rng = np.random.default_rng(0)
    for name in ("initial_state", "d_state"):
        inputs[name] = rng.standard_normal((4, 2, 64, 64)).astype(np.float32)
    want = in_float64(inputs, cu_seqlens=bounds)
    chunked = run(inputs, implementation="xla", dtype=jnp.bfloat16, cu_seqlens=bounds)
    assert_bfloat16(run(inputs, dtype=jnp.bfloat16, cu_seqlens=bounds), chunked, want)


@pytest.mark.slow
def test_no_race_in_two_rows_of_two_groups_of_heads():
    inputs = cases.draw("random", shape(B=2, T=130, H=16))
    want = oracle.delta_product(**inputs)
    got = run(inputs, detect_races=True)
    assert_float32(got, run(inputs, implementation="reference"), want)


@pytest.mark.slow
@pytest.mark.parametrize("T", (1, 130))
def test_divided_among_devices(T):
    """Also where an axis of the mesh divides neither rows nor heads."""
    inputs = cases.draw("twelve_keys_gated", shape(B=2, T=T, H=2))
    assert_same_on_a_mesh(inputs, pallas_kernels.delta_product)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(K=48), "head sizes .* but K is 48; the nearest is 64"),
        (dict(V=512), "but V is 512; the nearest is 256"),
        (dict(N=9), "at most 8 steps a token, but there are 9"),
        (dict(H=36), "at most 32 heads of this size .* are 36; the nearest is 40"),
    ),
)
def test_shapes_it_cannot_take(change, message):
    inputs = cases.draw("random", shape(**change))
    with pytest.raises(NotImplementedError, match=message):
        run(inputs)


def test_chunks_and_types_it_cannot_take():
    inputs = cases.draw("random", shape())
    operands = {name: inputs[name] for name in INPUTS}
    operands["implementation"] = "pallas_tpu"
    with platform.interpreted_tpu():
        with pytest.raises(NotImplementedError, match="has 128 tokens .* is 64"):
            pallas_kernels.delta_product(**operands, chunk_size=64)
        with jax.enable_x64():
            operands["v"] = operands["v"].astype(np.float64)
            with pytest.raises(NotImplementedError, match="float64, but v has it"):
                pallas_kernels.delta_product(**operands)
