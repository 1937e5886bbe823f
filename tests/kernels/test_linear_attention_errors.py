"""What gated linear attention says to a caller's mistakes."""

import jax.numpy as jnp
import pytest

from pallas_kernels import gated_linear_attention


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def arguments(**changed):
    """B 2, T 5, H 3, K 4, V 6."""
    good = {"q": ones(2, 5, 3, 4), "k": ones(2, 5, 3, 4), "v": ones(2, 5, 3, 6)}
    return good | changed


VALUE_ERRORS = [
    ({"q": ones(2, 5, 3)}, r"q has shape \(2, 5, 3\), .* \[B, T, H, K\]"),
    ({"k": ones(2, 4, 3, 4)}, r"k has shape \(2, 4, 3, 4\), .* T = 5 as in q"),
    ({"v": ones(2, 5, 1, 6)}, r"v has shape .* \[B, T, H, V\] with H = 3 as in q"),
    ({"g": ones(2, 5)}, r"g has shape \(2, 5\), .* \[B, T, H\], .* \[B, T, H, K\]"),
    ({"g": ones(2, 5, 4)}, r"g has shape \(2, 5, 4\), .* H = 3 as in q"),
    ({"g": ones(2, 5, 3, 6)}, r"g has shape \(2, 5, 3, 6\), .* K = 4 as in q"),
    ({"initial_state": ones(2, 3, 6, 4)}, r"initial_state .* K = 4 as in q"),
    ({"segment_ids": ones(2, 6, dtype=int)}, "segment_ids has .* T = 5 as in q"),
    ({"cu_seqlens": ones(3, dtype=int)}, "one batch row, but q has B = 2"),
    ({"chunk_size": 0}, "chunk_size is 0, but a chunk has at least one token"),
    ({"precision": "sharp"}, "precision is 'sharp', .* default, high, highest"),
    ({"implementation": "cuda"}, "no implementation 'cuda'; choose one of"),
]
TYPE_ERRORS = [
    ({"g": ones(2, 5, 3, dtype=int)}, "g has dtype int32, .* float32"),
    ({"k": ones(2, 5, 3, 4, dtype=jnp.float16)}, "k has dtype float16, .* bfloat16"),
    ({"segment_ids": ones(2, 5)}, "segment_ids has dtype float32, .* integers"),
    ({"chunk_size": 16.0}, "chunk_size is 16.0, but it must be an int"),
]


@pytest.mark.parametrize("changed, message", VALUE_ERRORS)
def test_wrong_values(changed, message):
    with pytest.raises(ValueError, match="gated_linear_attention.*" + message):
        gated_linear_attention(**arguments(**changed))


@pytest.mark.parametrize("changed, message", TYPE_ERRORS)
def test_wrong_types(changed, message):
    with pytest.raises(TypeError, match="gated_linear_attention.*" + message):
        gated_linear_attention(**arguments(**changed))


@pytest.mark.parametrize("kernel", ("pallas_tpu", "pallas_gpu"))
def test_a_named_kernel_that_cannot_run_is_not_replaced(kernel):
    message = f"gated_linear_attention cannot run with implementation='{kernel}'"
    with pytest.raises(NotImplementedError, match=message):
        gated_linear_attention(**arguments(implementation=kernel))
