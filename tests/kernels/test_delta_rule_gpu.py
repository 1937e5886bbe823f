"""The GPU kernels of the delta rule: interpreted, and compiled for Hopper."""

from functools import partial

import delta_rule_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from recurrence_law import assert_bfloat16, in_float64, narrowed
from recurrence_law import run as run_operation

import pallas_kernels
from benchmarks.cases import delta_rule as cases
from pallas_kernels import aot, platform

INPUTS = ("q", "k", "v", "beta", "g", "initial_state")
run = partial(
    run_operation, implementation="pallas_gpu", dtype=jnp.bfloat16, detect_races=True
)
run_chunked = partial(run_operation, implementation="xla", dtype=jnp.bfloat16)


def shape(T=150, N=1, H=2, K=64, V=64, B=1):
    """Three chunks, one more than lie in shared memory; the last is not full."""
    return cases.Shape(B, T, N, H, K, V)


@pytest.mark.parametrize("name", cases.HARD)
def test_errs_like_the_chunked_form_on_hard_inputs(name):
    """Results and all gradients, without a race."""
    inputs = narrowed(cases.draw(name, shape()))
    want = oracle.delta_product(**inputs)
    assert_bfloat16(run(inputs), run_chunked(inputs), want)


def test_without_a_gradient():
    """Nothing is saved then; the results are the same bits."""
    inputs = narrowed(cases.draw("mixed_decay", shape()))
    want = run(inputs)
    operands = {name: inputs[name] for name in INPUTS}
    operands |= {name: jnp.asarray(inputs[name], jnp.bfloat16) for name in "qkv"}
    with platform.interpreted_gpu(detect_races=True):
        got = pallas_kernels.delta_product(**operands, implementation="pallas_gpu")
    for tensor, found in zip(("o", "state"), got, strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float64), want[tensor])


@pytest.mark.parametrize("name", ("one_key", "reflections"))
def test_roundings_do_not_add_up_along_a_row(name):
    """Ten chunks of a state that is never forgotten."""
    inputs = narrowed(cases.draw(name, shape(T=600, H=1)))
    want = oracle.delta_product(**inputs)
    assert_bfloat16(run(inputs), run_chunked(inputs), want)


@pytest.mark.parametrize(
    "sizes",
    (
        dict(T=140, K=128, V=64, B=2, H=1),
        pytest.param(dict(K=64, V=128), marks=pytest.mark.slow),
        pytest.param(dict(K=128, V=128, N=2, T=40), marks=pytest.mark.slow),
        dict(N=3, T=40),  # 48 keys a chunk, of the 64 there are
        pytest.param(dict(N=5, T=30), marks=pytest.mark.slow),
        dict(N=8, T=20, H=1),  # 8 tokens a chunk, fewer than a product sums over
        dict(T=1),
    ),
)
def test_other_sizes(sizes):
    inputs = narrowed(cases.draw("twelve_keys_gated", shape(**sizes)))
    want = oracle.delta_product(**inputs)
    assert_bfloat16(run(inputs), run_chunked(inputs), want)


def test_segments_and_padding():
    inputs = narrowed(cases.draw("twelve_keys_gated", shape(T=160)))
    ids = np.repeat([0, 0, 3, -1, 3, 7, 8, -1], 20)[None]
    inputs["v"][ids < 0] = np.nan
    want = in_float64(inputs, segment_ids=ids)
    chunked = run_chunked(inputs, segment_ids=ids)
    assert_bfloat16(run(inputs, segment_ids=ids), chunked, want)


@pytest.mark.parametrize("N", (1, pytest.param(2, marks=pytest.mark.slow)))
def test_ragged_sequences_have_states_of_their_own(N):
    """Some empty, some of one chunk and of several, and tokens past the last."""
    inputs = narrowed(cases.draw("twelve_keys_gated", shape(T=160, N=N)))
    bounds = np.asarray([0, 3, 3, 120, 150, 150])
    rng = np.random.default_rng(0)
    for name in ("initial_state", "d_state"):
        inputs[name] = rng.standard_normal((5, 2, 64, 64)).astype(np.float32)
    want = in_float64(inputs, cu_seqlens=bounds)
    chunked = run_chunked(inputs, cu_seqlens=bounds)
    assert_bfloat16(run(inputs, cu_seqlens=bounds), chunked, want)


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
    inputs = cases.draw("random", shape(**change))
    with pytest.raises(NotImplementedError, match=message):
        run(inputs)


def test_chunks_types_and_platforms_it_cannot_take():
    inputs = cases.draw("random", shape())
    operands = {name: jnp.asarray(inputs[name]) for name in INPUTS}
    call = partial(pallas_kernels.delta_product, implementation="pallas_gpu")
    with platform.interpreted_gpu():
        with pytest.raises(NotImplementedError, match="bfloat16, but q is float32; ca"):
            call(**operands)
        operands |= {name: jnp.bfloat16(operands[name]) for name in "qkv"}
        with pytest.raises(NotImplementedError, match="has 64 tokens .* is 128; pass"):
            call(**operands, chunk_size=128)
        with jax.enable_x64():
            wide = operands | {"g": operands["g"].astype(jnp.float64)}
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
def test_it_compiles_for_hopper_without_spills(sizes):
    arguments = {"implementation": "pallas_gpu", "backward": True} | sizes
    job = aot.Job("pallas_kernels.programs:delta_rule", arguments, "h100")
    (report,) = aot.compile_jobs([job])
    assert report.error is None, report.error
    names = sorted(kernel.name for kernel in report.kernels)
    assert names[-1] == "delta_rule_forward"
    assert names[:-1] == ["delta_rule_backward"] * arguments["backward"]
    for kernel in report.kernels:
        assert kernel.stored == kernel.loaded == 0, kernel
        assert kernel.shared <= 227 * 1024, kernel
