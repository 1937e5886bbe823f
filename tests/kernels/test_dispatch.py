"""Which implementation is taken where none is named, and the evidence for it."""

import json
from functools import partial
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from benchmarks import defaults
from benchmarks.record import RESULTS
from pallas_kernels import dispatch, platform
from pallas_kernels.tpu import block_sizes

EVIDENCE = json.loads((RESULTS / "defaults.json").read_text())["cycles"]
ALSO = {"linear_attention": "gated_linear_attention"}  # by its public name


def test_the_evidence_is_of_all_operations():
    estimated = {operation.partition(",")[0] for operation in EVIDENCE}
    names = {ALSO.get(name, name) for name in estimated} | {"delta_product"}
    assert names == set(dispatch.FASTER["pallas_tpu"])
    assert set(EVIDENCE) == set(defaults.OPERATIONS)


@pytest.mark.parametrize("operation", EVIDENCE)
def test_a_kernel_is_taken_where_it_has_half_the_cycles(operation):
    name = operation.partition(",")[0]
    fewest = dispatch.FASTER["pallas_tpu"][ALSO.get(name, name)]
    for case, chips in EVIDENCE[operation].items():
        if defaults.CASES[case].get("T", 1) < fewest:
            continue
        known = [c for c in chips.values() if None not in c.values()]
        assert known, f"{operation}, {case} has no estimate."
        for cycles in known:
            assert cycles["pallas_tpu"] <= cycles["xla"] / 2, (operation, case)


AUTO = jax.sharding.AxisType.Auto
KERNEL = "delta_rule_forward"


def mesh(*sizes, axes=("data", "fsdp", "tensor")):
    return jax.make_mesh(sizes, axes[: len(sizes)], axis_types=(AUTO,) * len(sizes))


def traced(implementation=None, B=2, T=256, H=4, K=64, f=pallas_kernels.delta_rule):
    x = jax.ShapeDtypeStruct((B, T, H, K), jnp.float32)
    beta = jax.ShapeDtypeStruct((B, T, H), jnp.float32)
    return str(
        jax.make_jaxpr(lambda *a: f(*a, implementation=implementation))(x, x, x, beta)
    )


def test_none_takes_a_kernel_where_it_is_faster():
    with jax.set_mesh(mesh(1)):
        assert "pallas_call" not in traced()
        with platform.interpreted_tpu():
            assert KERNEL in traced()
            assert "pallas_call" not in traced(T=255)
            assert "pallas_call" not in traced(K=24)  # the kernel has no such
            assert "pallas_call" not in traced("xla")


def test_none_takes_a_kernel_where_all_devices_have_a_part():
    with platform.interpreted_tpu():
        assert "pallas_call" not in traced()  # of which devices, it is not known
        with jax.set_mesh(mesh(2, 1, 4)):
            assert KERNEL in traced()
            assert "pallas_call" not in traced(B=1)
            assert "pallas_call" not in traced(H=2)
        with jax.set_mesh(mesh(2, axes=("sequence",))):
            assert "pallas_call" not in traced()


def test_none_takes_no_kernel_inside_a_shard_map():
    """There one device's part is traced, and what varies is checked."""
    devices = mesh(2)
    part = jax.sharding.PartitionSpec("data")

    def f(*arrays, implementation):
        run = partial(pallas_kernels.delta_rule, implementation=implementation)
        return jax.shard_map(run, mesh=devices, in_specs=part, out_specs=part)(*arrays)

    with platform.interpreted_tpu(), jax.set_mesh(devices):
        assert "pallas_call" not in traced(f=f)


def test_none_takes_no_gpu_kernel():
    """None has been measured."""
    x = jnp.zeros((1, 256, 1, 64), jnp.bfloat16)
    with platform.interpreted_gpu(), jax.set_mesh(mesh(1)):
        jaxpr = jax.make_jaxpr(pallas_kernels.delta_rule)(x, x, x, x[..., 0])
        assert "pallas_call" not in str(jaxpr) and "mosaic" not in str(jaxpr)


def test_the_platform_is_that_of_the_default_device():
    device = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    with mock.patch.object(jax, "devices", return_value=[device]):
        assert platform.platform() == "tpu" and block_sizes.chip() == "v5e"
    with mock.patch.object(jax, "default_backend", return_value="tpu"):
        with jax.default_device(jax.devices("cpu")[1]):
            assert platform.platform() == "cpu"
        with jax.default_device("cpu"):
            assert platform.platform() == "cpu" and block_sizes.chip() == "v6e"


@pytest.mark.parametrize(
    "f", (pallas_kernels.delta_rule, pallas_kernels.gated_linear_attention)
)
def test_a_second_derivative_is_refused_in_a_sentence(f):
    x = jnp.ones((1, 3, 1, 64))

    def gradient(x):
        rest = (x[..., 0],) if f is pallas_kernels.delta_rule else ()
        run = lambda y: f(x, y, x, *rest, implementation="pallas_tpu")[0].sum()  # noqa: E731
        return jax.grad(run)(x).sum()

    with platform.interpreted_tpu(), pytest.raises(NotImplementedError, match="again"):
        jax.make_jaxpr(jax.grad(gradient))(x)
