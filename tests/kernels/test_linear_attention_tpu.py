"""The TPU kernels of linear attention, interpreted, against a float64 oracle."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from linear_attention_oracle import gated_linear_attention as oracle
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

from benchmarks.cases import linear_attention as cases
from pallas_kernels import gated_linear_attention

run = partial(
    run_operation, operation=gated_linear_attention, implementation="pallas_tpu"
)
KINDS = tuple(
    (name, decay)
    for name, hard in cases.HARD.items()
    for decay in (cases.DECAYS if hard.g is not None else cases.DECAYS[:1])
)


def shape(B=1, T=200, H=3, K=64, V=64):
    """Two chunks, the last not full, and heads that do not make a group."""
    return cases.Shape(B, T, H, K, V)


def assert_float32(inputs, **options):
    reference = run(inputs, implementation="reference", **options)
    assert_law(run(inputs, **options), reference, oracle(**inputs))


def assert_narrow(inputs):
    inputs = narrowed(inputs)
    chunked = run(inputs, implementation="xla", dtype=jnp.bfloat16)
    assert_bfloat16(run(inputs, dtype=jnp.bfloat16), chunked, oracle(**inputs))


@pytest.mark.parametrize("decay", cases.DECAYS)
def test_bfloat16(decay):
    assert_narrow(cases.draw("mixed_decay", shape(), decay))


@pytest.mark.parametrize(("name", "decay"), KINDS)
def test_float32_on_hard_inputs(name, decay):
    assert_float32(cases.draw(name, shape(), decay))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "decay"), KINDS)
def test_bfloat16_on_hard_inputs(name, decay):
    assert_narrow(cases.draw(name, shape(), decay))


@pytest.mark.slow
@pytest.mark.parametrize("decay", cases.DECAYS)
@pytest.mark.parametrize(("K", "V", "H"), ((128, 64, 9), (64, 256, 3)))
def test_keys_and_values_of_different_sizes(K, V, H, decay):
    """Also a group of heads that is not full."""
    assert_float32(cases.draw("mixed_decay", shape(T=130, K=K, V=V, H=H), decay))
    assert_narrow(cases.draw("mixed_decay", shape(T=130, K=K, V=V, H=H), decay))


@pytest.mark.slow
@pytest.mark.parametrize("decay", cases.DECAYS)
def test_no_race_in_two_rows_of_two_groups_of_heads(decay):
    inputs = cases.draw("gate", shape(B=2, T=130, H=16), decay)
    reference = run(inputs, implementation="reference")
    assert_law(run(inputs, detect_races=True), reference, oracle(**inputs))


@pytest.mark.parametrize("decay", cases.DECAYS)
def test_segments_and_padding(decay):
    inputs = cases.draw("mixed_decay", shape(), decay)
    ids = np.repeat([0, 0, 3, -1, 3, 7, 8, -1], 25)[None]
    inputs["v"][ids < 0] = np.nan
    want = in_float64(inputs, operation=gated_linear_attention, segment_ids=ids)
    reference = run(inputs, implementation="reference", segment_ids=ids)
    assert_law(run(inputs, segment_ids=ids), reference, want)


@pytest.mark.parametrize("decay", cases.DECAYS)
def test_ragged_sequences_have_states_of_their_own(decay):
    """Also an empty one, and tokens after the last."""
    inputs = cases.draw("mixed_decay", shape(), decay)
    bounds = np.asarray([0, 3, 3, 140, 180, 180])
    rng = np.random.default_rng(0)
    for name in ("initial_state", "d_state"):
        inputs[name] = rng.standard_normal((5, 3, 64, 64)).astype(np.float32)
    want = in_float64(inputs, operation=gated_linear_attention, cu_seqlens=bounds)
    reference = run(inputs, implementation="reference", cu_seqlens=bounds)
    assert_law(run(inputs, cu_seqlens=bounds), reference, want)


@pytest.mark.parametrize(
    ("name", "decay"),
    (("no_decay", "scalar"), ("gate", "scalar"), ("mixed_decay", "channel")),
)
def test_a_single_token(name, decay):
    """The gradient, which is that of the chunk's, and the step's kernel.

    The latter of two groups of heads, of which a chunk's program would be long.
    """
    assert_float32(cases.draw(name, shape(T=1, B=2), decay))
    inputs = cases.draw(name, shape(T=1, H=16, B=2), decay)
    want = oracle(**inputs)
    reference = run(inputs, implementation="reference")
    results = results_alone(inputs, gated_linear_attention)
    for tensor, got in zip(("o", "state"), results, strict=True):
        bound = 4 * max(error(reference[tensor], want[tensor]), EPS)
        assert error(np.asarray(got, np.float64), want[tensor]) <= bound, tensor


@pytest.mark.slow
@pytest.mark.parametrize("T", (1, 130))
@pytest.mark.parametrize("decay", cases.DECAYS)
def test_divided_among_devices(decay, T):
    inputs = cases.draw("gate", shape(B=2, T=T, H=2), decay)
    assert_same_on_a_mesh(inputs, gated_linear_attention)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(K=48), "head sizes .* but K is 48; the nearest is 64"),
        (dict(H=36), "at most 32 heads of this size .* are 36; the nearest is 40"),
    ),
)
def test_shapes_it_cannot_take(change, message):
    with pytest.raises(NotImplementedError, match=message):
        run(cases.draw("gate", shape(**change)))


def test_chunks_it_cannot_take():
    inputs = cases.draw("gate", shape())
    with pytest.raises(NotImplementedError, match="has 128 tokens, but chunk_size is"):
        run(inputs, chunk_size=64)
