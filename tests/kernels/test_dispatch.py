"""Which implementation is taken where none is named, and the evidence for it."""

import json

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from benchmarks import defaults
from benchmarks.record import RESULTS
from pallas_kernels import dispatch, platform

EVIDENCE = json.loads((RESULTS / "defaults.json").read_text())["cycles"]
ALSO = {"linear_attention": "gated_linear_attention"}  # by its public name


def test_the_evidence_is_of_all_operations():
    estimated = {operation.partition(",")[0] for operation in EVIDENCE}
    names = {ALSO.get(name, name) for name in estimated} | {"delta_product"}
    assert names == set(dispatch.FASTER["pallas_tpu"])
    assert set(EVIDENCE) == set(defaults.OPERATIONS)


@pytest.mark.parametrize("operation", EVIDENCE)
def test_a_kernel_is_taken_where_it_has_half_the_cycles(operation):
    for case, chips in EVIDENCE[operation].items():
        known = [c for c in chips.values() if None not in c.values()]
        assert known, f"{operation}, {case} has no estimate."
        for cycles in known:
            assert cycles["pallas_tpu"] <= cycles["xla"] / 2, (operation, case)


def delta_rule(implementation=None, K=64):
    x = jax.ShapeDtypeStruct((1, 3, 1, K), jnp.float32)
    beta = jax.ShapeDtypeStruct((1, 3, 1), jnp.float32)
    f = lambda *a: pallas_kernels.delta_rule(*a, implementation=implementation)  # noqa: E731
    return str(jax.make_jaxpr(f)(x, x, x, beta))


def test_none_takes_a_kernel_where_its_division_is_known():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with platform.interpreted_tpu():
        assert "pallas_call" not in delta_rule()  # of several devices, undivided
        with jax.set_mesh(mesh):
            assert "delta_rule_forward" in delta_rule()
            assert "pallas_call" not in delta_rule(K=24)  # the kernel has no such
            assert "pallas_call" not in delta_rule("xla")
    with jax.set_mesh(mesh):
        assert "pallas_call" not in delta_rule()


def test_none_takes_no_gpu_kernel():
    """None has been measured."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.zeros((1, 3, 1, 64), jnp.bfloat16)
    with platform.interpreted_gpu(), jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(pallas_kernels.delta_rule)(x, x, x, x[..., 0])
        assert "pallas_call" not in str(jaxpr) and "mosaic" not in str(jaxpr)
