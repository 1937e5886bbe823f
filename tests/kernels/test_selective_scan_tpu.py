"""The TPU kernels of the selective scan, interpreted, against a float64 oracle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrence_law import (
    assert_bfloat16,
    assert_law,
    assert_same_on_a_mesh,
    in_float64,
    narrowed,
)
from selective_scan_law import run as run_operation
from selective_scan_oracle import selective_scan as oracle

from benchmarks.cases import selective_scan as cases
from pallas_kernels import selective_scan
from pallas_kernels.tpu import block_sizes

run = partial(run_operation, implementation="pallas_tpu")
NARROW = ("x", "B", "C")


def shape(B=1, T=150, E=256, N=8):
    """Two chunks, the last not full, and two groups of channels."""
    return cases.Shape(B, T, E, N)


@pytest.mark.parametrize("name", cases.HARD)
def test_law_on_hard_inputs(name):
    inputs = cases.draw(name, shape())
    reference = run(inputs, implementation="reference")
    assert_law(run(inputs), reference, oracle(**inputs))


def test_a_single_token():
    """No kernel's, but of the same name."""
    inputs = cases.draw("mixed", shape(B=2, T=1))
    reference = run(inputs, implementation="reference")
    assert_law(run(inputs), reference, oracle(**inputs))


@pytest.mark.parametrize("N", (16, 32))
def test_law_with_more_states_and_three_groups(N):
    """Also a grid step that holds all groups, of an odd number."""
    inputs = cases.draw("mixed", shape(T=130, E=384, N=N))
    reference = run(inputs, implementation="reference")
    assert_law(run(inputs), reference, oracle(**inputs))


def test_bfloat16():
    inputs = narrowed(cases.draw("mixed", shape()), (*NARROW, "d_y"))
    options = {"dtype": jnp.bfloat16, "narrow": NARROW}
    chunked = run(inputs, implementation="xla", **options)
    assert_bfloat16(run(inputs, **options), chunked, oracle(**inputs))


@pytest.mark.slow
def test_no_race_in_two_rows_of_two_grid_steps():
    inputs = cases.draw("mixed", shape(B=2, T=130))
    reference = run(inputs, implementation="reference")
    with block_sizes.trying({"heads": 1}):
        got = run(inputs, detect_races=True)
    assert_law(got, reference, oracle(**inputs))


def test_segments_and_padding():
    inputs = cases.draw("mixed", shape(T=200))
    ids = np.repeat([0, 0, 3, -1, 3, 7, 8, -1], 25)[None]
    inputs["x"][ids < 0] = np.nan
    want = in_float64(inputs, operation=selective_scan, segment_ids=ids)
    reference = run(inputs, implementation="reference", segment_ids=ids)
    assert_law(run(inputs, segment_ids=ids), reference, want)


def test_ragged_sequences_have_states_of_their_own():
    """Also an empty one, and tokens after the last."""
    inputs = cases.draw("mixed", shape(T=200))
    bounds = np.asarray([0, 3, 3, 140, 180, 180])
    rng = np.random.default_rng(0)
    for name in ("initial_state", "d_state"):
        inputs[name] = rng.standard_normal((5, 256, 8)).astype(np.float32)
    want = in_float64(inputs, operation=selective_scan, cu_seqlens=bounds)
    reference = run(inputs, implementation="reference", cu_seqlens=bounds)
    assert_law(run(inputs, cu_seqlens=bounds), reference, want)


@pytest.mark.slow
@pytest.mark.parametrize("T", (1, 130))
def test_divided_among_devices(T):
    inputs = cases.draw("mixed", shape(B=4, T=T, E=256))
    summed = ("d_A", "d_B", "d_C", "d_D")
    assert_same_on_a_mesh(inputs, selective_scan, summed)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(E=200), "multiple of 128 channels, but E is 200; the nearest is 256"),
        (dict(N=12), "multiple of 8 states .* but N is 12; the nearest is 16"),
        (dict(N=40), "at most 32 states per channel, but N is 40"),
    ),
)
def test_shapes_it_cannot_take(change, message):
    with pytest.raises(NotImplementedError, match=message):
        run(cases.draw("no_decay", shape(**change)))


def test_types_it_cannot_take():
    with jax.enable_x64():
        inputs = cases.draw("no_decay", shape(T=8))
        inputs["dt"] = inputs["dt"].astype(np.float64)
        with pytest.raises(NotImplementedError, match="no float64, but dt has it"):
            run(inputs)


def test_chunks_it_cannot_take():
    with pytest.raises(NotImplementedError, match="has 128 tokens, but chunk_size is"):
        run(cases.draw("no_decay", shape()), chunk_size=64)
