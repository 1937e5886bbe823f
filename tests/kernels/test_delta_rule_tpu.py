"""The TPU kernel of the delta rule, interpreted: values against a float64 oracle."""

from functools import partial

import delta_rule_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_law import EPS, error

import pallas_kernels
from pallas_kernels import platform
from pallas_kernels.delta_rule import cases

# Long programs that run once: most of the time would go into optimising them.
FAST_COMPILATION = {"xla_backend_optimization_level": 0}
BFLOAT16_EPS = float(jnp.finfo(jnp.bfloat16).eps)
INPUTS = ("q", "k", "v", "beta", "g", "initial_state")


@partial(jax.jit, static_argnums=(0, 3), compiler_options=FAST_COMPILATION)
def interpret(operation, operands, streams, precision=None):
    settings = {"precision": precision, "implementation": "pallas_tpu"}
    return operation(**operands, **streams, **settings)


def run(inputs, implementation="pallas_tpu", dtype=None, precision=None, **streams):
    """The outputs and the state in float64; bfloat16 operands where `dtype` says so."""
    operation = pallas_kernels.delta_product
    operands = {name: inputs[name] for name in INPUTS if inputs[name] is not None}
    if dtype is not None:
        operands |= {name: jnp.asarray(operands[name], dtype) for name in "qkv"}
    if implementation == "pallas_tpu":
        with platform.interpreted_tpu(uninitialized_memory="nan"):
            o, state = interpret(operation, operands, streams, precision)
    else:
        o, state = operation(**operands, **streams, implementation=implementation)
    return {"o": np.asarray(o, np.float64), "state": np.asarray(state, np.float64)}


def shape(T=200, N=1, H=3, K=64, V=64, B=1):
    """Two chunks, the last not full, and heads that do not fill a pack."""
    return cases.Shape(B, T, N, H, K, V)


def assert_float32(got, reference, want):
    """At most 16 times the error of the recurrence.

    The chunked form stays within 4 by refining its solution; the kernel does not, and
    its chunks are longer.
    """
    for name in ("o", "state"):
        bound = max(16 * error(reference[name], want[name]), 16 * EPS)
        assert error(got[name], want[name]) <= bound, name


@pytest.mark.parametrize("name", cases.HARD)
def test_float32_on_hard_inputs(name):
    inputs = cases.draw(name, shape())
    want = oracle.delta_product(**inputs)
    assert_float32(run(inputs), run(inputs, "reference"), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("twelve_keys_gated", "mixed_decay", "random"))
def test_three_steps_a_token(name):
    inputs = cases.draw(name, shape(T=70, N=3))
    want = oracle.delta_product(**inputs)
    assert_float32(run(inputs), run(inputs, "reference"), want)


@pytest.mark.parametrize("name", cases.HARD)
def test_bfloat16_errs_like_the_chunked_form(name):
    inputs = cases.draw(name, shape())
    for operand in "qkv":  # the oracle sees what the kernel sees
        inputs[operand] = np.asarray(jnp.bfloat16(inputs[operand]), np.float32)
    want = oracle.delta_product(**inputs)
    got = run(inputs, dtype=jnp.bfloat16)
    chunked = run(inputs, "xla", dtype=jnp.bfloat16)
    for tensor in ("o", "state"):
        bound = max(2 * error(chunked[tensor], want[tensor]), BFLOAT16_EPS)
        assert error(got[tensor], want[tensor]) <= bound, tensor


def test_precision_and_operands_of_two_types():
    """HIGH is no less than HIGHEST, also of bfloat16; the wider type is multiplied."""
    inputs = cases.draw("twelve_keys", shape())
    for operand in "qkv":
        inputs[operand] = np.asarray(jnp.bfloat16(inputs[operand]), np.float32)
    plain = run(inputs)
    mixed = inputs | {"k": jnp.asarray(inputs["k"], jnp.bfloat16)}
    for got in (run(inputs, precision="high"), run(mixed)):
        for tensor in plain:
            np.testing.assert_array_equal(got[tensor], plain[tensor])
    narrow = run(inputs, dtype=jnp.bfloat16, precision="highest")
    np.testing.assert_array_equal(narrow["state"], plain["state"])
    coarse = run(inputs, precision="default")
    assert error(coarse["state"], plain["state"]) > 1e-4


def test_segments_and_padding():
    inputs = cases.draw("twelve_keys_gated", shape())
    ids = np.repeat([0, 0, 3, -1, 3, 7, 8, -1], 25)[None]
    inputs["v"][ids < 0] = np.nan
    reference = run(inputs, "reference", segment_ids=ids)
    got = run(inputs, segment_ids=ids)
    for tensor in reference:
        assert error(got[tensor], reference[tensor]) < 1e-5


def test_ragged_sequences_have_states_of_their_own():
    inputs = cases.draw("twelve_keys_gated", shape(H=2))
    bounds = np.asarray([0, 3, 3, 140, 180, 180])
    rng = np.random.default_rng(0)
    inputs["initial_state"] = rng.standard_normal((5, 2, 64, 64)).astype(np.float32)
    reference = run(inputs, "reference", cu_seqlens=bounds)
    got = run(inputs, cu_seqlens=bounds)
    for tensor in reference:
        assert error(got[tensor], reference[tensor]) < 1e-5


@pytest.mark.slow
def test_no_race_in_two_rows_of_two_groups_of_heads():
    inputs = cases.draw("random", shape(B=2, T=130, H=16))
    operands = {name: inputs[name] for name in INPUTS}
    want = oracle.delta_product(**inputs)
    with platform.interpreted_tpu(detect_races=True, uninitialized_memory="nan"):
        o, state = interpret(pallas_kernels.delta_product, operands, {})
    assert error(np.asarray(o, np.float64), want["o"]) < 16 * EPS
    assert error(np.asarray(state, np.float64), want["state"]) < 16 * EPS


@pytest.mark.slow
def test_gradients_are_those_of_the_chunked_form():
    inputs = cases.draw("twelve_keys_gated", shape(H=2))
    operands = {name: inputs[name] for name in INPUTS}

    @partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILATION)
    def gradients(implementation, operands):
        def f(operands):
            return pallas_kernels.delta_product(
                **operands, implementation=implementation
            )

        return jax.vjp(f, operands)[1]((inputs["d_o"], inputs["d_state"]))

    with platform.interpreted_tpu():
        got = gradients("pallas_tpu", operands)
    want = gradients("xla", operands)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want
    )


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(K=48), "head sizes .* but K is 48; the nearest is 64"),
        (dict(V=512), "but V is 512; the nearest is 256"),
        (dict(N=9), "at most 8 steps a token, but there are 9"),
        (dict(H=26), "but H is 26; the nearest is 32"),
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
