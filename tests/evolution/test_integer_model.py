"""The integer model, bit for bit against loops over Python's integers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integer_oracle import (
    KEY,
    SMALL,
    TINY,
    Oracle,
    clip,
    forward,
    segment_loss,
    start,
    text,
    zeros,
)

from jaxlab import params as parameters
from jaxlab.evolution.integer import integer_model as model
from jaxlab.evolution.integer.integer_model import Config, Perturbed

# Arithmetic ---------------------------------------------------------------------------


def test_shifts_and_divisions_round_to_negative_infinity():
    """Golden values, the same for arrays and for noise; a fan-in of 4 shifts by 5."""
    for total, out in (
        *((-1, -1), (-31, -1), (-32, -1), (-33, -2), (0, 0), (31, 0), (32, 1)),
    ):
        u = jnp.array([[total, 0, 0, 0]], jnp.int8)
        w = jnp.eye(4, 1, dtype=jnp.int8)
        assert model.linear(u, w).tolist() == [[out]], total
        # as noise: total * 63 // 2^8, added to 5 * total before the shift
        a, b = jnp.eye(4, 1, dtype=jnp.int8)[:, 0], jnp.full(1, 63, jnp.int8)
        got = model.linear(u, Perturbed(w * 5, a, b, 8))
        assert got.tolist() == [[math.floor((5 * total + (total * 63 // 256)) / 32)]]
    x = jnp.array([[5, -5, 4, 0], [0, 0, 0, 0], [1, -1, 0, 0]], jnp.int8)
    scale = jnp.full(4, 16, jnp.int8)
    want = [[26, -27, 21, 0], [0, 0, 0, 0], [16, -16, 0, 0]]  # means 3, 1, 1
    assert model.layer_norm(x, scale).tolist() == want
    a = jnp.array([1, -1, 16, -16, 17, -17], jnp.int8)
    moved = model.vector(Perturbed(jnp.zeros_like(a), a, jnp.full_like(a, 16), 8))
    assert moved.tolist() == [0, -1, 1, -1, 1, -2]
    table = Perturbed(jnp.zeros((6, 1), jnp.int8), a, jnp.full(1, 16, jnp.int8), 8)
    rows = model.embed(table, jnp.arange(6))
    assert rows.tolist() == [[0], [-1], [1], [-1], [1], [-2]]


def test_everything_saturates_at_127_and_nothing_is_minus_128():
    wide = jnp.array([-(2**31), -129, -128, -127, 126, 127, 128, 2**31 - 1])
    assert model.saturate(wide).tolist() == [*[-127] * 4, 126, *[127] * 3]
    u = jnp.full((1, 16), 127, jnp.int8)
    w = jnp.stack([u[0], -u[0]], 1)
    assert model.linear(u, w).tolist() == [[127, -127]]
    noise = jnp.full(16, 63, jnp.int8)
    for sign in (1, -1):
        moved = model.vector(Perturbed(sign * u[0], sign * noise, noise, 8))
        assert moved.tolist() == [sign * 127] * 16


def test_the_widest_sums_of_noise_fit_32_bits():
    """A fan-in of 4096 with the largest noise there is."""
    n = 4 * model.WIDEST
    u = jnp.full((1, n), 127, jnp.int8)
    noise = jnp.full(n, 63, jnp.int8)
    for sign in (1, -1):
        w = Perturbed(jnp.zeros((n, 1), jnp.int8), sign * noise, noise[:1], 16)
        want = clip((sign * n * 127 * 63 * 63 >> 16) >> 10)
        assert model.linear(u, w).tolist() == [[want]] and abs(want) < 127
    assert model.MOST_IDS * int(model.EXP2[-1]) < 2**31
    assert 2**19 * 63**2 < 2**31  # votes of the largest population


def test_log2_is_the_nearest_sixteenth():
    """On all small numbers, around every power and border, and at random."""
    borders = [2 ** (k / 32) for k in range(32 * 31)]
    x = [*range(1, 2**12), 2**31 - 1]
    x += [int(b) + d for b in borders for d in (-1, 0, 1) if 0 < b + d < 2**31 - 1]
    x += np.random.default_rng(0).integers(1, 2**31, 10_000).tolist()
    x = [n for n in x if n > 0]
    want = [round(16 * math.log2(n)) for n in x]
    assert jax.jit(model.log2)(np.int32(x)).tolist() == want


def test_the_loss_is_the_surprise_in_sixteenths_of_a_bit():
    """To 1/2 for rounding, and to what V floors can take from the sum of powers.

    That is much only where all logits are among the lowest.
    """
    V = 257
    rng = np.random.default_rng(0)
    logits = rng.integers(-127, 128, (64, V))
    logits[:3] = np.array([-127, 127, 0])[:, None]
    logits[3, 1:], logits[3, 0] = -127, 127
    targets = rng.integers(0, V, 64)
    targets[3] = 5
    got = jax.jit(model.loss)(logits.astype(np.int8), targets.astype(np.int32))
    exact = 16 * np.log2((2 ** (logits / 16)).sum(1)) - logits[np.arange(64), targets]
    total = 16 * (2 ** ((logits + 128) / 16)).sum(1)
    bound = 0.5 + 16 * np.log2(total / (total - V))
    assert np.all(np.abs(np.asarray(got) - exact) <= bound) and np.median(bound) < 0.51
    assert int(got[0]) == round(16 * math.log2(16 * V)) - 64 - 1  # floors to 16
    assert model.bits(np.array([2**31 - 1, 1])) == 2**27  # no overflow in the sum


# The model ----------------------------------------------------------------------------


def test_parameters_are_as_many_as_the_paper_says_and_begin_as_it_does():
    cfg = Config(width=64, layers=2, vocab_size=256, separator=0)
    weights = jax.jit(lambda key: parameters.init(model.spec(cfg), key))(KEY)
    count = 513 * 64 + 2 * (4 * 64 + 12 * 64**2)
    assert parameters.count(weights) == parameters.count(model.spec(cfg)) == count
    for name, w in parameters.named_leaves(weights):
        w = np.asarray(w, np.int32)
        assert np.abs(w).max() <= 127
        if "norm" in name or "/b_" in name:
            np.testing.assert_array_equal(w, 16 if "norm" in name else 0)
        else:
            assert w.std() == pytest.approx(16, rel=0.03), name
    assert {w.dtype for w in jax.tree.leaves(weights)} == {jnp.dtype(jnp.int8)}


@pytest.mark.parametrize("size", (1, 6))
@pytest.mark.parametrize("cfg", (TINY, SMALL), ids=("tiny", "small"))
def test_forward_is_the_oracles(cfg, size):
    """Also with weights six times as large, most of which saturate."""
    _, _, weights = start(cfg=cfg, size=size)
    tokens = text(cfg, 3, 9)
    tokens[0, 4] = cfg.separator
    state = model.init_state(cfg, 3)
    logits, state = forward(weights, tokens, cfg, state)
    assert logits.dtype == state.dtype == jnp.int8
    oracle = Oracle(cfg, weights)
    for row in range(3):
        want, last = oracle.forward(tokens[row], zeros(cfg))
        assert logits[row].tolist() == want
        assert state[:, row].tolist() == last
    assert len(np.unique(logits)) > 10 and (size == 1 or np.any(np.abs(logits) == 127))


@pytest.mark.parametrize("sign", (1, -1))
@pytest.mark.parametrize("size", (1, 6))
def test_a_member_is_the_oracle_with_its_noise_materialised(size, sign):
    strategy, state, weights = start(cfg=SMALL, size=size)
    noise = strategy.noise(state, jnp.int32(3))
    member = strategy.member(weights, noise, jnp.int8(sign))
    tokens = text(SMALL, 1, 9)
    found = forward(member, tokens, SMALL, model.init_state(SMALL, 1))
    want = Oracle(SMALL, weights, noise, sign).forward(tokens[0], zeros(SMALL))
    assert found[0][0].tolist() == want[0]
    assert found[1][:, 0].tolist() == want[1]
    base = forward(weights, tokens, SMALL, model.init_state(SMALL, 1))
    assert np.any(np.asarray(base[0]) != np.asarray(found[0]))


@pytest.mark.parametrize("cuts", ((5,), (1, 2, 11)))
def test_segments_that_carry_their_state_are_the_whole(cuts):
    _, _, weights = start(cfg=SMALL)
    tokens = text(SMALL, 2, 12)
    assert np.any(tokens == SMALL.separator)
    state = model.init_state(SMALL, 2)
    whole, last = forward(weights, tokens, SMALL, state)
    parts = []
    for part in np.split(tokens, cuts, axis=1):
        logits, state = forward(weights, part, SMALL, state)
        parts.append(logits)
    np.testing.assert_array_equal(np.concatenate(parts, 1), whole)
    np.testing.assert_array_equal(state, last)


def test_a_separator_forgets_what_was_before_and_nothing_else_does():
    _, _, weights = start(cfg=SMALL)
    tokens = text(SMALL, 2, 12) % 10  # none is the separator
    tokens[0, 8:] = tokens[1, 8:]
    assert not np.array_equal(tokens[0], tokens[1])
    state = model.init_state(SMALL, 2)
    logits, last = forward(weights, tokens, SMALL, state)
    assert np.any(logits[0, 8:] != logits[1, 8:])
    tokens[:, 8] = SMALL.separator
    logits, last = forward(weights, tokens, SMALL, state)
    np.testing.assert_array_equal(logits[0, 8:], logits[1, 8:])
    np.testing.assert_array_equal(last[:, 0], last[:, 1])
    fresh, _ = forward(weights, tokens[:, 8:], SMALL, state)
    np.testing.assert_array_equal(logits[:, 8:], fresh)


def test_two_separators_are_the_border_of_two_documents_and_do_not_count():
    _, _, weights = start(cfg=SMALL)
    tokens = np.array([[1, 10, 10, 2, 10]], np.int32)
    state = model.init_state(SMALL, 1)
    total, _ = segment_loss(weights, tokens, SMALL, state)
    logits, _ = forward(weights, tokens[:, :-1], SMALL, state)
    each = np.asarray(jax.jit(model.loss)(logits, tokens[:, 1:]))[0]
    assert int(total[0]) == int(each[0] + each[2] + each[3]) != int(each.sum())


# Errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 32}, "width is 32, but must be a power of 4"),
        ({"width": 4096}, "width is 4096, .* sums of 32 bits"),
        ({"layers": 0}, "layers is 0, but must be at least 1"),
        ({"vocab_size": 4096}, "vocab_size is 4096, but must be 2 to 2048"),
        ({"vocab_size": 256}, "separator is 256, but the ids .* are 0 to 255"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)
