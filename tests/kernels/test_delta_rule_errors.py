"""What the delta rule says to a caller's mistakes."""

import jax.numpy as jnp
import pytest

from pallas_kernels import delta_product, delta_rule
from pallas_kernels.dispatch import select


def arguments(**changed):
    """B 2, T 5, H 3, K 4, V 6."""
    good = {
        "q": jnp.ones((2, 5, 3, 4)),
        "k": jnp.ones((2, 5, 3, 4)),
        "v": jnp.ones((2, 5, 3, 6)),
        "beta": jnp.ones((2, 5, 3)),
    }
    return good | changed


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


VALUE_ERRORS = [
    ({"q": ones(2, 5, 3)}, r"q has shape \(2, 5, 3\), .* \[B, T, H, K\]"),
    ({"k": ones(2, 5, 1, 3, 4)}, r"k has shape .* 4 axes \[B, T, H, K\]"),
    ({"k": ones(2, 4, 3, 4)}, r"k has shape \(2, 4, 3, 4\), .* T = 5 as in q"),
    ({"k": ones(2, 5, 3, 7)}, "K = 4 as in q"),
    ({"v": ones(2, 5, 1, 6)}, r"v has shape .* \[B, T, H, V\] with H = 3 as in q"),
    ({"beta": ones(2, 5, 3, 4)}, r"beta has shape .* 3 axes \[B, T, H\]"),
    ({"beta": ones(1, 5, 3)}, r"beta has shape .* B = 2 as in q"),
    ({"g": ones(2, 5, 4)}, r"g has shape \(2, 5, 4\), .* H = 3 as in q"),
    ({"initial_state": ones(2, 3, 6, 4)}, r"initial_state .* K = 4 as in q"),
    ({"initial_state": ones(2, 3, 4, 5)}, "V = 6 as in v"),
    ({"segment_ids": ones(2, 6, dtype=int)}, "segment_ids has .* T = 5 as in q"),
    ({"cu_seqlens": ones(1, 3, dtype=int)}, r"cu_seqlens .* 1 axes \[S \+ 1\]"),
    ({"cu_seqlens": ones(3, dtype=int)}, "one batch row, but q has B = 2"),
    ({"cu_seqlens": ones(1, dtype=int)}, r"shape \(1,\).* S >= 1"),
    (
        {"cu_seqlens": ones(3, dtype=int), "initial_state": ones(3, 3, 4, 6)},
        r"initial_state has shape .* \[S, H, K, V\] with S = 2 as in cu_seqlens",
    ),
    (
        {"cu_seqlens": ones(3, dtype=int), "segment_ids": ones(2, 5, dtype=int)},
        "pass only one of them",
    ),
    (
        {name: ones(0, *x.shape[1:]) for name, x in arguments().items()},
        "B = 0 in q, but every axis",
    ),
    ({"chunk_size": 0}, "chunk_size is 0, but a chunk has at least one token"),
    ({"precision": "sharp"}, "precision is 'sharp', .* default, high, highest"),
    ({"implementation": "cuda"}, "no implementation 'cuda'; choose one of"),
    ({"q": ones(2, 5, 3, 0), "k": ones(2, 5, 3, 0)}, "K = 0 in q, but every axis"),
]
TYPE_ERRORS = [
    ({"q": ones(2, 5, 3, 4, dtype=jnp.float16)}, "q has dtype float16, .* bfloat16"),
    ({"beta": ones(2, 5, 3, dtype=int)}, "beta has dtype int32, .* float32"),
    ({"segment_ids": ones(2, 5)}, "segment_ids has dtype float32, .* integers"),
    ({"cu_seqlens": ones(3)}, "cu_seqlens has dtype float32, .* integers"),
    ({"chunk_size": 16.0}, "chunk_size is 16.0, but it must be an int"),
    ({"chunk_size": True}, "chunk_size is True, but it must be an int"),
]


@pytest.mark.parametrize("changed, message", VALUE_ERRORS)
def test_wrong_values(changed, message):
    with pytest.raises(ValueError, match="delta_rule.*" + message):
        delta_rule(**arguments(**changed))


@pytest.mark.parametrize("bounds", ([0, 4, 2], [0, 6], [1, 5], [0, 3, 6]))
def test_sequences_that_fall_or_leave_the_row(bounds):
    row = {name: x[:1] for name, x in arguments().items()}
    with pytest.raises(ValueError, match="must rise from 0 to at most T = 5"):
        delta_rule(**row, cu_seqlens=jnp.array(bounds))


@pytest.mark.parametrize("changed, message", TYPE_ERRORS)
def test_wrong_types(changed, message):
    with pytest.raises(TypeError, match="delta_rule.*" + message):
        delta_rule(**arguments(**changed))


def test_delta_product_names_its_own_axes():
    keys = {"k": ones(2, 5, 2, 3, 4), "beta": ones(2, 5, 2, 3)}
    with pytest.raises(ValueError, match=r"delta_product: k .* \[B, T, N, H, K\]"):
        delta_product(**arguments())
    with pytest.raises(ValueError, match=r"v has shape .* N = 2 as in k"):
        delta_product(**arguments(**keys, v=ones(2, 5, 3, 3, 6)))
    keys = {"k": ones(2, 5, 0, 3, 4), "v": ones(2, 5, 0, 3, 6)}
    with pytest.raises(ValueError, match="N = 0 in k, but every axis"):
        delta_product(**arguments(**keys, beta=ones(2, 5, 0, 3)))


@pytest.mark.parametrize(
    ("kernel", "reason"),
    (
        ("pallas_tpu", "its TPU kernel runs on a TPU"),
        ("pallas_gpu", "its GPU kernel runs on a Hopper GPU"),
    ),
)
def test_a_named_kernel_that_cannot_run_is_not_replaced(kernel, reason):
    message = f"delta_rule cannot run with implementation='{kernel}': {reason}"
    with pytest.raises(NotImplementedError, match=message):
        delta_rule(**arguments(implementation=kernel))


def test_the_best_that_can_run_is_taken():
    candidates = {"pallas_tpu": "no TPU.", "pallas_gpu": max, "xla": min}
    assert select("f", None, candidates) is max
    assert select("f", "xla", candidates) is min
    with pytest.raises(NotImplementedError, match="f cannot run .* no TPU."):
        select("f", "pallas_tpu", candidates)
