"""Attention merged from parts of the keys is attention over all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_attention_oracle import paged_attention as oracle

from benchmarks.cases import paged_attention as cases
from pallas_kernels.paged_attention import merge_partials, paged_attention


def softmax_attention(scores, values):
    """Of rows [R, N] and [N, D] in float64; 0 and -inf for a row without keys."""
    with np.errstate(divide="ignore"):
        largest = np.max(scores, -1, initial=-1e300, keepdims=True)
        weights = np.exp(scores - largest)
        total = weights.sum(-1, keepdims=True)
        o = weights @ values / np.where(total > 0, total, 1)
        return o, (largest + np.log(total))[:, 0]


def parts(sizes, dtype=np.float32):
    """Scores and values, and attention over parts of `sizes` keys."""
    rng = np.random.default_rng(0)
    scores = 30 * rng.standard_normal((5, sum(sizes)))
    scores[1, : sizes[0]] = scores[2] = -np.inf  # row 1 lacks a part, row 2 has no key
    values = rng.standard_normal((sum(sizes), 3))
    ends = np.cumsum(sizes)[:-1]
    pieces = zip(np.split(scores, ends, 1), np.split(values, ends), strict=True)
    outputs, log_sum_exps = zip(*[softmax_attention(*p) for p in pieces], strict=True)
    outputs = [np.asarray(x, dtype) for x in outputs]
    return scores, values, outputs, [np.asarray(x, dtype) for x in log_sum_exps]


@pytest.mark.parametrize("sizes", ((4,), (3, 2), (1, 6, 0, 2)), ids=str)
def test_merged_is_one_softmax(sizes):
    scores, values, outputs, log_sum_exps = parts(sizes)
    o, lse = merge_partials(outputs, log_sum_exps)
    want_o, want_lse = softmax_attention(scores, values)
    assert o.dtype == lse.dtype == jnp.float32
    np.testing.assert_allclose(o, want_o, atol=2e-5)  # scores of 60: 2^-18 of a weight
    finite = np.isfinite(want_lse)
    np.testing.assert_allclose(lse[finite], want_lse[finite], rtol=2e-7, atol=1e-6)
    assert not finite[2] and np.isneginf(lse[2]) and np.all(o[2] == 0)


def test_in_float64_it_is_exact():
    scores, values, outputs, log_sum_exps = parts((3, 5, 2), np.float64)
    with jax.enable_x64():
        o, lse = merge_partials(np.stack(outputs), np.stack(log_sum_exps))
    want_o, want_lse = softmax_attention(scores, values)
    assert o.dtype == lse.dtype == jnp.float64
    np.testing.assert_allclose(o, want_o, atol=1e-13)
    np.testing.assert_allclose(lse[3:], want_lse[3:], atol=1e-13)


def test_a_part_without_keys_may_hold_anything():
    _, _, outputs, log_sum_exps = parts((3, 2))
    want = merge_partials(outputs, log_sum_exps)
    nothing = np.full(5, -np.inf, np.float32)
    for anything in (np.nan, np.inf, 7.0):
        part = np.full((5, 3), anything, np.float32)
        got = merge_partials([part, *outputs], [nothing, *log_sum_exps])
        for x, y in zip(got, want, strict=True):
            np.testing.assert_array_equal(x, y)


def test_bfloat16_outputs_are_merged_in_float32():
    _, _, outputs, log_sum_exps = parts((3, 5, 2))
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in outputs]
    o, lse = merge_partials(narrow, log_sum_exps)
    wide = [x.astype(jnp.float32) for x in narrow]
    want, _ = merge_partials(wide, log_sum_exps)
    assert o.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_array_equal(o, want.astype(jnp.bfloat16))


@pytest.mark.parametrize("implementation", ("reference", "xla"))
def test_a_prefix_apart(implementation):
    """A decoded token's attention to the first pages and to the rest, merged."""
    arrays = cases.draw([(1, 8), (1, 13), (1, 48)])
    first_pages = 2
    table, lengths = arrays["page_table"], arrays["kv_lens"]
    split = np.minimum(lengths, first_pages * cases.SMALL.page)
    prefix = arrays | {"kv_lens": split}
    columns = np.roll(table, -first_pages, axis=1)
    rest = arrays | {"kv_lens": lengths - split, "page_table": columns}
    outputs, log_sum_exps = zip(
        *[
            paged_attention(
                **part, implementation=implementation, return_log_sum_exp=True
            )
            for part in (prefix, rest)
        ],
        strict=True,
    )
    assert np.isneginf(log_sum_exps[1][0]).all()  # 8 keys are all in the prefix
    o, lse = merge_partials(outputs, log_sum_exps)
    want_o, want_lse = oracle(**arrays)
    np.testing.assert_allclose(o, want_o, atol=2e-6)
    np.testing.assert_allclose(lse[:3], want_lse[:3], rtol=2e-6)


def test_wrong_parts():
    o, lse = jnp.zeros((4, 2)), jnp.zeros(4)
    with pytest.raises(ValueError, match="merge_partials: there are 0 outputs"):
        merge_partials([], [])
    with pytest.raises(ValueError, match="2 outputs and 1 log_sum_exps"):
        merge_partials([o, o], [lse])
    with pytest.raises(ValueError, match=r"log_sum_exp \(4, 2\), .* and \(4,\)"):
        merge_partials([o], [o])
    with pytest.raises(ValueError, match=r"has shape \(3, 2\) .* must be \(4, 2\)"):
        merge_partials([o, o[:3]], [lse, lse[:3]])
    with pytest.raises(ValueError, match=r"has shape \(\) and its .*, \[..., D\]"):
        merge_partials([lse[0]], [lse[0]])
    with pytest.raises(ValueError, match="outputs is one number, .* a list of arrays"):
        merge_partials(lse[0], lse)
    for wrong, message in (
        (None, "outputs is None, but it must be an array"),
        ([o, None], r"outputs\[1\] is None, but it must be an array"),
        (["text"], r"outputs\[0\] is of type str and makes no array of numbers"),
        ([o.astype(int)], r"outputs\[0\] has dtype int32, .* one of float32"),
    ):
        with pytest.raises(TypeError, match="merge_partials: " + message):
            merge_partials(wrong, [lse])
