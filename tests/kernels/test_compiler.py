"""A fault of XLA's fusions on a CPU, and that our programs are free of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from benchmarks import compiled

X = np.random.default_rng(0).standard_normal((1024, 32), np.float32)
METHODS = (
    "delta_rule",
    "delta_rule, decay",
    "delta_rule, values of one",
    "delta_product",
    "linear_attention",
    "linear_attention, values of one",
    "linear_attention, decay a head",
    "linear_attention, decay a channel",
    "selective_scan",
    *compiled.mixer_configs(1),
)


def sums(x):
    """The sum over the columns of x times a matrix of ones, a row."""
    return jnp.sum(x @ jnp.ones((32, 32)), axis=-1)


@pytest.mark.xfail(strict=True, reason="jaxlib 0.11.2 to 0.12.0.1 multiplies wrongly")
def test_a_product_with_a_constant_is_compiled_rightly():
    """Once it passes, `streams.opaque` and this file are for older compilers only."""
    want = 32 * np.sum(X, axis=-1)
    np.testing.assert_allclose(jax.jit(sums)(X), want, rtol=1e-4, atol=1e-2)


def test_constant_operands_are_seen_in_a_compiled_program():
    program = jax.jit(sums).lower(X).compile()
    assert compiled.constant_operands(program.as_text()) == ["jit(sums)/dot_general"]
    opaque = jax.jit(lambda x: x @ jax.lax.optimization_barrier(jnp.ones((32, 32))))
    program = opaque.lower(X).compile()
    assert compiled.constant_operands(program.as_text()) == []


def test_a_wrong_program_differs():
    wrong = compiled.compare((sums, (X,)), "float32")
    assert wrong["difference"] > 0.1 and not wrong["right"]


# Small shapes are right by chance; these are some that were wrong.
@example("delta_product", "forward", 1, (512, 8), "float32")
@example("linear_attention, decay a head", "with state", 1, (128, 32), "float32")
@example("linear_attention, values of one", "forward", 1, (512, 8), "float32")
@example("mamba2", "with state", 1, (64, 64), "float32")
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(METHODS),
    st.sampled_from(compiled.PARTS),
    st.sampled_from(compiled.HEADS),
    st.one_of(
        st.sampled_from(compiled.SHAPES),
        st.tuples(st.integers(1, 600), st.integers(1, 40)),
    ),
    st.sampled_from(tuple(compiled.TOLERANCE)),
)
def test_compiled_equals_eager(method, part, heads, shape, dtype):
    operations = compiled.operations(heads, *shape, jnp.dtype(dtype))
    if method in operations:
        programs = compiled.programs_of_operation(*operations[method])
    else:
        cfg = compiled.mixer_configs(heads).get(method)
        assume(cfg is not None)  # the Mamba of one state space has no heads
        programs = compiled.programs_of_mixer(cfg, *shape, jnp.dtype(dtype))
    assume(part in programs)  # an operation has no step of its own
    got = compiled.compare(programs[part], dtype, eager=part != "gradient")
    assert got["constant_operands"] == []
    assert got["right"], got
