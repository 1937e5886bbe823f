"""What gated linear attention has beyond the laws of every recurrence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from recurrence_law import EPS, error, one_segment, run
from recurrences import A_CHANNEL, A_HEAD

from pallas_kernels import gated_linear_attention


def test_a_decay_a_channel_may_be_that_of_the_head():
    inputs = A_HEAD.draw("mixed_decay")
    ids = one_segment(inputs)
    want = run(A_HEAD, inputs, "xla", segment_ids=ids)
    inputs["g"] = np.repeat(inputs["g"][..., None], inputs["q"].shape[-1], axis=-1)
    got = run(A_CHANNEL, inputs, "xla", segment_ids=ids)
    got["d_g"] = got["d_g"].sum(-1)
    for tensor in want:
        assert error(got[tensor], want[tensor]) < 32 * EPS, tensor


def loss(*operands):
    """Of the operation and of two more that go on from its state."""

    def body(state, _):
        o, state = gated_linear_attention(*operands, initial_state=state)
        return state, o

    _, state = gated_linear_attention(*operands)
    state, o = jax.lax.scan(body, state, length=2)
    return jnp.sum(state**2) + jnp.sum(o**2)


@functools.cache
def whole(T):
    """The operands, the loss, and its gradients for all of them."""
    inputs = A_HEAD.draw("mixed_decay", B=1, T=T)
    operands = [inputs[name] for name in A_HEAD.operands]
    return operands, *jax.jit(jax.value_and_grad(loss, argnums=range(4)))(*operands)


@pytest.mark.parametrize("T", (7, 150))
@pytest.mark.parametrize("divided", range(4))
def test_one_divided_operand_divides_the_results(divided, T):
    """In a `shard_map`, where the others are whole, and in a loop there."""
    operands, value, gradients = whole(T)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    specs = [P("rows") if i == divided else P() for i in range(4)]

    def both(*operands):
        value, gradient = jax.value_and_grad(loss, argnums=divided)(*operands)
        return value[None], gradient

    twice = list(operands)
    twice[divided] = np.concatenate([twice[divided]] * 2)
    f = jax.shard_map(both, mesh=mesh, in_specs=tuple(specs), out_specs=P("rows"))
    values, got = jax.jit(f)(*twice)
    np.testing.assert_allclose(values, [value] * 2, rtol=1e-5)
    want = np.concatenate([gradients[divided]] * 2)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
