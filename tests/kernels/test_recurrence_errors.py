"""What the recurrences say to a caller's mistakes."""

import numpy as np
import pytest

from pallas_kernels import (
    delta_product,
    delta_rule,
    gated_linear_attention,
    selective_scan,
)
from pallas_kernels.dispatch import select


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


# B 2, T 5, H 3, K 4, V 6, and for the selective scan E 3, N 4.
KEYS = {"q": ones(2, 5, 3, 4), "k": ones(2, 5, 3, 4), "v": ones(2, 5, 3, 6)}
GOOD = {
    delta_rule: KEYS | {"beta": ones(2, 5, 3)},
    gated_linear_attention: KEYS,
    selective_scan: {
        "x": ones(2, 5, 3),
        "dt": ones(2, 5, 3),
        "A": -ones(3, 4),
        "B": ones(2, 5, 4),
        "C": ones(2, 5, 4),
        "D": ones(3),
    },
}
STATE = {delta_rule: "HKV", gated_linear_attention: "HKV", selective_scan: "EN"}


def ints(*shape):
    return ones(*shape, dtype=int)


VALUE_ERRORS = {
    delta_rule: [
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
        (
            {n: ones(0, *x.shape[1:]) for n, x in GOOD[delta_rule].items()},
            "B = 0 in q, but every axis",
        ),
        ({"q": ones(2, 5, 3, 0), "k": ones(2, 5, 3, 0)}, "K = 0 in q, but every axis"),
    ],
    gated_linear_attention: [
        ({"q": ones(2, 5, 3)}, r"q has shape \(2, 5, 3\), .* \[B, T, H, K\]"),
        ({"k": ones(2, 4, 3, 4)}, r"k has shape \(2, 4, 3, 4\), .* T = 5 as in q"),
        ({"v": ones(2, 5, 1, 6)}, r"v has shape .* \[B, T, H, V\] with H = 3 as in q"),
        ({"g": ones(2, 5)}, r"g has shape \(2, 5\), .* \[B, T, H\], .* \[B, T, H, K\]"),
        ({"g": ones(2, 5, 4)}, r"g has shape \(2, 5, 4\), .* H = 3 as in q"),
        ({"g": ones(2, 5, 3, 6)}, r"g has shape \(2, 5, 3, 6\), .* K = 4 as in q"),
        ({"initial_state": ones(2, 3, 6, 4)}, r"initial_state .* K = 4 as in q"),
    ],
    selective_scan: [
        ({"x": ones(2, 5)}, r"x has shape \(2, 5\), .* 3 axes \[B, T, E\]"),
        ({"dt": ones(2, 4, 3)}, r"dt has shape \(2, 4, 3\), .* T = 5 as in x"),
        ({"A": ones(4, 3)}, r"A has shape \(4, 3\), .* \[E, N\] with E = 3 as in x"),
        ({"B": ones(2, 5, 3)}, r"B has shape .* \[B, T, N\] with N = 4 as in A"),
        ({"C": ones(1, 5, 4)}, "C has shape .* B = 2 as in x"),
        ({"D": ones(4)}, r"D has shape \(4,\), .* E = 3 as in x"),
        ({"initial_state": ones(2, 4, 3)}, "initial_state .* E = 3 as in x"),
        (
            {"A": ones(3, 0), "B": ones(2, 5, 0), "C": ones(2, 5, 0)},
            "N = 0 in A, but every axis",
        ),
    ],
}
# Of every operation; {first} is its first argument.
STREAM_ERRORS = [
    ({"segment_ids": ints(2, 6)}, "segment_ids has .* T = 5 as in {first}"),
    ({"cu_seqlens": ints(1, 3)}, r"cu_seqlens .* 1 axes \[S \+ 1\]"),
    ({"cu_seqlens": ints(3)}, "one batch row, but {first} has B = 2"),
    ({"cu_seqlens": ints(1)}, r"shape \(1,\).* S >= 1"),
    ({"cu_seqlens": ints(3), "segment_ids": ints(2, 5)}, "pass only one of them"),
    ({"chunk_size": 0}, "chunk_size is 0, but a chunk has at least one token"),
    ({"implementation": "cuda"}, "no implementation 'cuda'; choose one of"),
]
TYPE_ERRORS = {
    delta_rule: [
        ({"q": ones(2, 5, 3, 4, dtype="f2")}, "q has dtype float16, .* bfloat16"),
        ({"beta": ints(2, 5, 3)}, "beta has dtype int32, .* float32"),
    ],
    gated_linear_attention: [
        ({"g": ints(2, 5, 3)}, "g has dtype int32, .* float32"),
        ({"k": ones(2, 5, 3, 4, dtype="f2")}, "k has dtype float16, .* bfloat16"),
    ],
    selective_scan: [
        ({"x": ones(2, 5, 3, dtype="f2")}, "x has dtype float16, .* bfloat16"),
        ({"dt": ints(2, 5, 3)}, "dt has dtype int32, .* float32"),
    ],
}
SETTING_TYPE_ERRORS = [
    ({"segment_ids": ones(2, 5)}, "segment_ids has dtype float32, .* integers"),
    ({"cu_seqlens": ones(3)}, "cu_seqlens has dtype float32, .* integers"),
    ({"chunk_size": 16.0}, "chunk_size is 16.0, but it must be an int"),
    ({"chunk_size": True}, "chunk_size is True, but it must be an int"),
]
REASONS = {
    delta_rule: {"pallas_gpu": "its GPU kernel runs on a Hopper GPU"},
    gated_linear_attention: {"pallas_gpu": "there is no GPU"},
    selective_scan: {"pallas_gpu": "there is no GPU"},
}


def every(errors, shared):
    """Each operation with what is wrong and the message."""
    return pytest.mark.parametrize(
        ("f", "changed", "message"),
        [
            pytest.param(f, changed, message, id=f"{f.__name__}-{message}")
            for f in GOOD
            for changed, message in (*errors[f], *shared)
        ],
    )


every_operation = pytest.mark.parametrize("f", GOOD, ids=lambda f: f.__name__)


@every(VALUE_ERRORS, STREAM_ERRORS)
def test_wrong_values(f, changed, message):
    message = message.replace("{first}", next(iter(GOOD[f])))
    with pytest.raises(ValueError, match=f"{f.__name__}.*" + message):
        f(**GOOD[f] | changed)


@every(TYPE_ERRORS, SETTING_TYPE_ERRORS)
def test_wrong_types(f, changed, message):
    with pytest.raises(TypeError, match=f"{f.__name__}.*" + message):
        f(**GOOD[f] | changed)


@pytest.mark.parametrize("f", (delta_rule, gated_linear_attention))
def test_a_precision_that_is_none(f):
    message = "precision is 'sharp', .* default, high, highest"
    with pytest.raises(ValueError, match=f"{f.__name__}.*" + message):
        f(**GOOD[f], precision="sharp")


@every_operation
def test_a_state_for_each_sequence(f):
    axes = STATE[f]
    sizes = [dict(H=3, K=4, V=6, E=3, N=4)[axis] for axis in axes]
    rule = rf"\[S, {', '.join(axes)}\] with S = 2 as in cu_seqlens"
    with pytest.raises(ValueError, match="initial_state has shape .* " + rule):
        f(**GOOD[f], cu_seqlens=ints(3), initial_state=ones(3, *sizes))


@every_operation
@pytest.mark.parametrize("bounds", ([0, 4, 2], [0, 6], [1, 5], [0, 3, 6]))
def test_sequences_that_fall_or_leave_the_row(bounds, f):
    row = {n: x[:1] if len(x) == 2 else x for n, x in GOOD[f].items()}
    with pytest.raises(ValueError, match="must rise from 0 to at most T = 5"):
        f(**row, cu_seqlens=np.array(bounds))


def test_delta_product_names_its_own_axes():
    keys = {"k": ones(2, 5, 2, 3, 4), "beta": ones(2, 5, 2, 3)}
    good = GOOD[delta_rule]
    with pytest.raises(ValueError, match=r"delta_product: k .* \[B, T, N, H, K\]"):
        delta_product(**good)
    with pytest.raises(ValueError, match=r"v has shape .* N = 2 as in k"):
        delta_product(**good | keys | {"v": ones(2, 5, 3, 3, 6)})
    keys = {"k": ones(2, 5, 0, 3, 4), "v": ones(2, 5, 0, 3, 6)}
    with pytest.raises(ValueError, match="N = 0 in k, but every axis"):
        delta_product(**good | keys | {"beta": ones(2, 5, 0, 3)})


@every_operation
@pytest.mark.parametrize("kernel", ("pallas_tpu", "pallas_gpu"))
def test_a_named_kernel_that_cannot_run_is_not_replaced(kernel, f):
    reason = REASONS[f].get(kernel, "its TPU kernel runs on a TPU")
    message = f"{f.__name__} cannot run with implementation='{kernel}': {reason}"
    with pytest.raises(NotImplementedError, match=message):
        f(**GOOD[f], implementation=kernel)


def test_the_best_that_can_run_is_taken():
    candidates = {"pallas_tpu": "no TPU.", "pallas_gpu": max, "xla": min}
    assert select("f", None, candidates) is max
    assert select("f", "xla", candidates) is min
    with pytest.raises(NotImplementedError, match="f cannot run .* no TPU."):
        select("f", "pallas_tpu", candidates)
