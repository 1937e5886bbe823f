"""What the selective scan says to a caller's mistakes."""

import jax.numpy as jnp
import pytest

from pallas_kernels import selective_scan


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def arguments(**changed):
    """B 2, T 5, E 3, N 4."""
    good = {
        "x": ones(2, 5, 3),
        "dt": ones(2, 5, 3),
        "A": -ones(3, 4),
        "B": ones(2, 5, 4),
        "C": ones(2, 5, 4),
        "D": ones(3),
    }
    return good | changed


VALUE_ERRORS = [
    ({"x": ones(2, 5)}, r"x has shape \(2, 5\), .* 3 axes \[B, T, E\]"),
    ({"dt": ones(2, 4, 3)}, r"dt has shape \(2, 4, 3\), .* T = 5 as in x"),
    ({"A": ones(4, 3)}, r"A has shape \(4, 3\), .* \[E, N\] with E = 3 as in x"),
    ({"B": ones(2, 5, 3)}, r"B has shape .* \[B, T, N\] with N = 4 as in A"),
    ({"C": ones(1, 5, 4)}, "C has shape .* B = 2 as in x"),
    ({"D": ones(4)}, r"D has shape \(4,\), .* E = 3 as in x"),
    ({"initial_state": ones(2, 4, 3)}, "initial_state .* E = 3 as in x"),
    ({"segment_ids": ones(2, 6, dtype=int)}, "segment_ids has .* T = 5 as in x"),
    ({"cu_seqlens": ones(3, dtype=int)}, "one batch row, but x has B = 2"),
    (
        {"cu_seqlens": ones(3, dtype=int), "initial_state": ones(3, 3, 4)},
        r"initial_state has shape .* \[S, E, N\] with S = 2 as in cu_seqlens",
    ),
    (
        {"cu_seqlens": ones(3, dtype=int), "segment_ids": ones(2, 5, dtype=int)},
        "pass only one of them",
    ),
    (
        {"A": ones(3, 0), "B": ones(2, 5, 0), "C": ones(2, 5, 0)},
        "N = 0 in A, but every axis",
    ),
    ({"chunk_size": 0}, "chunk_size is 0, but a chunk has at least one token"),
    ({"implementation": "cuda"}, "no implementation 'cuda'; choose one of"),
]
TYPE_ERRORS = [
    ({"x": ones(2, 5, 3, dtype=jnp.float16)}, "x has dtype float16, .* bfloat16"),
    ({"dt": ones(2, 5, 3, dtype=int)}, "dt has dtype int32, .* float32"),
    ({"segment_ids": ones(2, 5)}, "segment_ids has dtype float32, .* integers"),
    ({"chunk_size": 16.0}, "chunk_size is 16.0, but it must be an int"),
]


@pytest.mark.parametrize("changed, message", VALUE_ERRORS)
def test_wrong_values(changed, message):
    with pytest.raises(ValueError, match="selective_scan.*" + message):
        selective_scan(**arguments(**changed))


@pytest.mark.parametrize("changed, message", TYPE_ERRORS)
def test_wrong_types(changed, message):
    with pytest.raises(TypeError, match="selective_scan.*" + message):
        selective_scan(**arguments(**changed))


@pytest.mark.parametrize("bounds", ([0, 4, 2], [0, 6], [1, 5]))
def test_sequences_that_fall_or_leave_the_row(bounds):
    row = {n: a[:1] if a.ndim == 3 else a for n, a in arguments().items()}
    with pytest.raises(ValueError, match="must rise from 0 to at most T = 5"):
        selective_scan(**row, cu_seqlens=jnp.array(bounds))


@pytest.mark.parametrize(
    ("kernel", "reason"),
    (("pallas_tpu", "its TPU kernel runs on a TPU"), ("pallas_gpu", "there is no GPU")),
)
def test_a_named_kernel_that_cannot_run_is_not_replaced(kernel, reason):
    message = f"selective_scan cannot run with implementation='{kernel}': {reason}"
    with pytest.raises(NotImplementedError, match=message):
        selective_scan(**arguments(implementation=kernel))
