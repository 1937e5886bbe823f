"""What the recurrences say to a caller's mistakes."""

import functools

import jax
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
PRODUCT = KEYS | {
    "k": ones(2, 5, 2, 3, 4),
    "v": ones(2, 5, 2, 3, 6),
    "beta": ones(2, 5, 2, 3),
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
    ({"implementation": 1}, "no implementation 1; choose one of"),
    ({"implementation": ["xla"]}, r"no implementation \['xla'\]; choose one of"),
    ({"implementation": {}}, "no implementation {}; choose one of"),
    ({"implementation": str}, "no implementation <class 'str'>; choose one of"),
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
    ({"chunk_size": "16"}, "chunk_size is '16', but it must be an int"),
    ({"{first}": None}, "{first} is None, but it must be an array"),
    ({"{second}": None}, "{second} is None, but it must be an array"),
    ({"{first}": "text"}, "{first} is of type str and makes no array of numbers; give"),
    ({"{first}": {}}, "{first} is of type dict and makes no array"),
    ({"{first}": [[1.0], [1.0, 2.0]]}, "{first} is of type list and makes no array"),
    ({"{first}": np.array([None])}, "{first} is of type ndarray and makes no array"),
    ({"segment_ids": "text"}, "segment_ids is of type str and makes no array"),
    ({"initial_state": object()}, "initial_state is of type object and makes no array"),
    ({"{first}": ones(2, 5, 3, 4, dtype="c8")}, "{first} has dtype complex64"),
]
SCALED = (delta_rule, delta_product, gated_linear_attention)
SCALE_ERRORS = [
    (float("nan"), ValueError, "scale is nan, but it must be finite"),
    (np.float32("inf"), ValueError, "scale is inf, but it must be finite"),
    (ones(3), ValueError, r"scale has shape \(3,\), but .* multiply q by them"),
    (ones(6), ValueError, r"scale has shape \(6,\), but it must be one number"),
    ([1.0], ValueError, r"scale has shape \(1,\), but it must be one number"),
    (True, TypeError, "scale has dtype bool, but it must be a real number"),
    (1j, TypeError, "scale has dtype complex64, but it must be a real number"),
    ("half", TypeError, "scale is of type str and makes no array"),
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


def call(f, changed):
    """Call with changed arguments; {first} and {second} are the first two."""
    first, second, *_ = GOOD[f]
    changed = {n.format(first=first, second=second): x for n, x in changed.items()}
    return f(**GOOD[f] | changed)


def said(f, message):
    first, second, *_ = GOOD[f]
    for place, name in (("{first}", first), ("{second}", second)):
        message = message.replace(place, name)
    return f"{f.__name__}.*" + message


@every(VALUE_ERRORS, STREAM_ERRORS)
def test_wrong_values(f, changed, message):
    with pytest.raises(ValueError, match=said(f, message)):
        call(f, changed)


@every(TYPE_ERRORS, SETTING_TYPE_ERRORS)
def test_wrong_types(f, changed, message):
    with pytest.raises(TypeError, match=said(f, message)):
        call(f, changed)


@pytest.mark.parametrize("f", SCALED, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("scale", "error", "message"), SCALE_ERRORS)
def test_a_scale_is_one_finite_number(scale, error, message, f):
    good = PRODUCT if f is delta_product else GOOD[f]
    with pytest.raises(error, match=f"{f.__name__}: " + message):
        f(**good, scale=scale)


@pytest.mark.parametrize("f", SCALED, ids=lambda f: f.__name__)
def test_a_traced_scale_is_checked_as_far_as_it_is_known(f):
    good = PRODUCT if f is delta_product else GOOD[f]

    def shapes(scale):
        return jax.eval_shape(lambda s: f(**good, scale=s), scale)

    assert shapes(float("nan"))[0].shape == (2, 5, 3, 6)
    with pytest.raises(ValueError, match="scale has shape .*, but it must be one num"):
        shapes(ones(6))


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
@pytest.mark.parametrize("dtype", (np.int32, np.uint32))
def test_sequences_that_fall_or_leave_the_row(dtype, bounds, f):
    """Also where the tokens are traced and the bounds are not."""
    row = {n: x[:1] if len(x) == 2 else x for n, x in GOOD[f].items()}
    bounds = np.array(bounds, dtype)
    split = functools.partial(f, cu_seqlens=bounds)
    for run in (split, functools.partial(jax.eval_shape, split)):
        with pytest.raises(ValueError, match="must rise from 0 to at most T = 5"):
            run(**row)


def test_delta_product_names_its_own_axes_and_arguments():
    keys = {name: PRODUCT[name] for name in ("k", "beta")}
    with pytest.raises(TypeError, match="delta_product: beta is None, but it must be"):
        delta_product(**PRODUCT | {"beta": None})
    with pytest.raises(ValueError, match="delta_product has no implementation 1; cho"):
        delta_product(**PRODUCT, implementation=1)
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
