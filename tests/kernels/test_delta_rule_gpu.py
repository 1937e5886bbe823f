"""The GPU kernels of the delta rule: interpreted, and compiled for Hopper."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from recurrence_law import (
    arguments,
    assert_bfloat16,
    narrowed,
    one_segment,
    run,
    with_states,
)
from recurrence_oracle import ragged, segmented
from recurrences import ONE_STEP, TWO_STEPS

import pallas_kernels
from pallas_kernels import aot, platform


def drawn(name="twelve_keys_gated", op=ONE_STEP, **sizes):
    """Three chunks, one more than lie in shared memory; the last is not full."""
    usual = {"B": 1, "T": 150, "H": 2, "K": 64, "V": 64}
    return narrowed(op, op.draw(name, **usual | sizes))


def kernel(inputs, **options):
    options |= {"dtype": jnp.bfloat16, "detect_races": True}
    return run(ONE_STEP, inputs, "pallas_gpu", **options)


def assert_law(inputs, want=None, **options):
    """It errs like the chunked form, without a race."""
    want = ONE_STEP.oracle(**inputs) if want is None else want
    chunked = run(ONE_STEP, inputs, "xla", dtype=jnp.bfloat16, **options)
    assert_bfloat16(kernel(inputs, **options), chunked, want)


@pytest.mark.parametrize("name", ONE_STEP.hard)
def test_errs_like_the_chunked_form_on_hard_inputs(name):
    """Results and all gradients."""
    inputs = drawn(name)
    assert_law(inputs, segment_ids=one_segment(inputs))


def test_segments_and_padding():
    inputs = drawn()
    ids = np.repeat([0, 0, 3, -1, 3, 7, 8, -1], 19)[None, :150]
    inputs["v"][ids < 0] = np.nan
    assert_law(inputs, segmented(ONE_STEP, inputs, ids), segment_ids=ids)


def test_without_a_gradient():
    """Nothing is saved then; the results are the same bits."""
    inputs = drawn("mixed_decay")
    ids = one_segment(inputs)
    want = kernel(inputs, segment_ids=ids)
    operands, _, _ = arguments(inputs)
    operands |= {name: operands[name].astype(jnp.bfloat16) for name in "qkv"}
    operands |= {"segment_ids": ids, "implementation": "pallas_gpu"}
    with platform.interpreted_gpu(detect_races=True):
        got = pallas_kernels.delta_product(**operands)
    for tensor, found in zip(("o", "state"), got, strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float64), want[tensor])


@pytest.mark.parametrize("name", ("one_key", "reflections"))
def test_roundings_do_not_add_up_along_a_row(name):
    """Ten chunks of a state that is never forgotten."""
    assert_law(drawn(name, T=600, H=1))


@pytest.mark.parametrize(
    "sizes",
    (
        dict(T=140, K=128, V=64, B=2, H=1),
        pytest.param(dict(K=64, V=128, H=1), marks=pytest.mark.slow),
        dict(N=3, T=40),  # 48 keys a chunk, of the 64 there are
        pytest.param(dict(K=128, V=128, N=5, T=30), marks=pytest.mark.slow),
        dict(N=8, T=20, H=1),  # 8 tokens a chunk, fewer than a product sums over
        dict(T=1),
    ),
)
def test_other_sizes(sizes):
    assert_law(drawn(**sizes))


@pytest.mark.parametrize(
    "op", (ONE_STEP, pytest.param(TWO_STEPS, marks=pytest.mark.slow)), ids=str
)
def test_ragged_sequences_have_states_of_their_own(op):
    """Some empty, some of one chunk and of several, and tokens past the last."""
    inputs = with_states(drawn(op=op), count=5)
    bounds = np.asarray([0, 3, 3, 120, 145, 145])
    assert_law(inputs, ragged(op, inputs, bounds), cu_seqlens=bounds)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(K=48), r"keys of \(64, 128\) channels, but K is 48; the nearest is 64"),
        (dict(K=256), "but K is 256; the nearest is 128, or pass"),
        (dict(V=80), "a multiple of 64 channels, but V is 80; the nearest is 128"),
        (dict(N=9), "at most 8 steps a token, but there are 9"),
    ),
)
def test_shapes_it_cannot_take(change, message):
    inputs = drawn("random", **change)
    with pytest.raises(NotImplementedError, match=message):
        kernel(inputs)


def test_chunks_types_and_platforms_it_cannot_take():
    operands, _, _ = arguments(drawn("random"))
    call = partial(pallas_kernels.delta_product, implementation="pallas_gpu")
    with platform.interpreted_gpu():
        with pytest.raises(NotImplementedError, match="bfloat16, but q is float32; ca"):
            call(**operands)
        operands |= {name: operands[name].astype(jnp.bfloat16) for name in "qkv"}
        with pytest.raises(NotImplementedError, match="has 64 tokens .* is 128; pass"):
            call(**operands, chunk_size=128)
        with jax.enable_x64():
            wide = operands | {"g": operands["g"].astype(np.float64)}
            with pytest.raises(NotImplementedError, match="float32, but g has float64"):
                call(**wide)
    with pytest.raises(NotImplementedError, match="Hopper GPU .*interpreted_gpu"):
        call(**operands)
    with platform.interpreted_tpu():
        with pytest.raises(NotImplementedError, match="Hopper"):
            call(**operands)


@pytest.mark.parametrize(
    ("kind", "runs"),
    (("NVIDIA H200", True), ("NVIDIA GH200 480GB", True), ("NVIDIA A100-SXM4", False)),
)
def test_only_hopper_runs_it(kind, runs):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    auto = (AxisType.Auto,)
    mesh = AbstractMesh((1,), ("x",), axis_types=auto, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform.runs_gpu_kernels() == runs


@pytest.mark.skipif(not aot.available("h100"), reason="needs JAX for CUDA")
@pytest.mark.parametrize(
    "sizes",
    (
        dict(T=4096, H=16, K=128, V=128),
        dict(T=4096, H=16, K=128, V=128, backward=False),
        pytest.param(dict(T=4096, H=16, K=64, gated=False), marks=pytest.mark.slow),
        pytest.param(
            dict(T=2000, H=2, V=256, N=2, sequences=3), marks=pytest.mark.slow
        ),
        pytest.param(dict(T=300, H=2, K=64, N=8), marks=pytest.mark.slow),
    ),
)
def test_it_compiles_for_hopper_without_spills(sizes, compile_jobs):
    arguments = {"implementation": "pallas_gpu", "backward": True} | sizes
    job = aot.Job("pallas_kernels.programs:delta_rule", arguments, "h100")
    (report,) = compile_jobs([job])
    assert report.error is None, report.error
    names = sorted(kernel.name for kernel in report.kernels)
    assert names[-1] == "delta_rule_forward"
    assert names[:-1] == ["delta_rule_backward"] * arguments["backward"]
    for kernel in report.kernels:
        assert kernel.stored == kernel.loaded == 0, kernel
        assert kernel.shared <= 227 * 1024, kernel
