"""Members, noise, votes and elections of the integer strategy."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integer_oracle import (
    ES,
    KEY,
    SMALL,
    TINY,
    Oracle,
    noise_of,
    segment_loss,
    start,
    stepping,
    text,
    zeros,
)

from jaxlab import params as parameters
from jaxlab.evolution.integer import IntegerEGGROLL
from jaxlab.evolution.integer import integer_model as model
from jaxlab.evolution.integer.integer_model import Config, Perturbed
from jaxlab.evolution.integer.strategy import (
    Outer,
    Product,
    count_votes,
    elect,
    preferences,
)

# Noise --------------------------------------------------------------------------------


def test_noise_is_a_rounded_normal_of_its_own_for_each_generation_and_direction():
    es = dataclasses.replace(ES, table_size=2**16)
    strategy, state, weights = start(es)
    table = np.asarray(state.table, np.float64)[: 2**16]
    assert np.abs(table).max() <= 63 and abs(table.mean()) < 5 * 16 / 256
    assert table.var() == pytest.approx(256, rel=5 * math.sqrt(2) / 256)
    assert abs((np.abs(table) < 16.5).mean() - 0.6976) < 0.01

    def drawn(number, generation):
        now = state.replace(generation=jnp.int32(generation))
        leaves = jax.tree.leaves(noise_of(strategy)(now, np.int32([number])))
        return np.concatenate([np.ravel(leaf) for leaf in leaves])

    np.testing.assert_array_equal(drawn(2, 5), drawn(2, 5))
    for other in (drawn(3, 5), drawn(2, 6), drawn(5, 2)):
        assert np.mean(other == drawn(2, 5)) < 0.1


def test_starts_in_the_table_are_uniform_and_wrap_around():
    """Places in a table of 256 tell where each entry of the noise is from."""
    cfg = Config(width=4, layers=1, vocab_size=2, separator=1)
    es = dataclasses.replace(ES, table_size=256)
    strategy, state, _ = start(es, cfg)
    length = len(state.table) - 256
    table = np.asarray(state.table)
    np.testing.assert_array_equal(table[256:], table[:length])
    places = (np.arange(256 + length) % 256).astype(np.int8)
    state = state.replace(table=jnp.asarray(places))
    noise = jax.device_get(noise_of(strategy)(state, np.arange(2**13, dtype=np.int32)))
    flat = [leaf.reshape(2**13, -1) for leaf in jax.tree.leaves(noise)]
    places = np.concatenate(flat, 1).astype(np.int64) % 256
    assert places.shape[1] == length
    np.testing.assert_array_equal(places, (places[:, :1] + np.arange(length)) % 256)
    counts = np.bincount(places[:, 0], minlength=256)
    chi_squared = ((counts - 32) ** 2 / 32).sum()
    assert 255 - 5 * math.sqrt(510) < chi_squared < 255 + 5 * math.sqrt(510)


def test_a_pair_has_opposite_noise_and_one_base():
    strategy, state, weights = start(cfg=SMALL)
    noise = jax.tree.map(lambda e: e[0], noise_of(strategy)(state, np.int32([1])))
    plus, minus = (strategy.member(weights, noise, jnp.int8(s)) for s in (1, -1))
    is_leaf = lambda x: isinstance(x, Perturbed)  # noqa: E731
    leaves = (jax.tree.leaves(m, is_leaf=is_leaf) for m in (plus, minus))
    for p, m, w in zip(*leaves, jax.tree.leaves(weights), strict=True):
        np.testing.assert_array_equal(p.a, -m.a)
        np.testing.assert_array_equal(p.b, m.b)
        assert p.w is m.w is w and p.shift == 8
    assert np.any(np.asarray(plus["norm"].a) != 0)


# Votes --------------------------------------------------------------------------------


def test_two_generations_are_the_oracles():
    """Losses of all members, states carried, votes and moves: nothing is left out."""
    strategy, state, weights = start()
    state = state.replace(generation=jnp.int32(30))
    texts = text(TINY, 2, 11)  # two segments of 5 that share a token
    hidden = [[zeros(TINY), zeros(TINY)] for _ in range(4)]
    step = stepping(strategy)
    for tokens in (texts[:, :6], texts[:, 5:]):
        noise = noise_of(strategy)(state, np.arange(4, dtype=np.int32))
        noise = jax.device_get(noise)
        losses = np.zeros((4, 2), np.int64)
        votes = jax.tree.map(lambda w: np.zeros(w.shape, np.int64), weights)
        for pair in range(4):
            own = jax.tree.map(lambda e, pair=pair: e[pair], noise)
            for which, sign in enumerate((1, -1)):
                oracle = Oracle(TINY, weights, own, sign)
                losses[pair, which], hidden[pair][which] = oracle.segment_loss(
                    tokens[pair // 2], hidden[pair][which]
                )
            f = int(np.sign(losses[pair, 1] - losses[pair, 0]))
            names = [name for name, _ in parameters.named_leaves(weights)]
            cast = Oracle(TINY, weights, own).e
            parts = [f * np.array(cast[name], np.int64) for name in names]
            parts = jax.tree.unflatten(jax.tree.structure(weights), parts)
            votes = jax.tree.map(np.add, votes, parts)
        assert len(np.unique(np.sign(losses[:, 0] - losses[:, 1]))) > 1
        # 256 sqrt(4) z, where z is exceeded with probability alpha on both sides
        alpha = 1 / (0.015 * int(state.generation) + 1)
        least = math.sqrt(2) * 512 * inverse_erfc(alpha)
        want = jax.tree.map(
            lambda w, v, least=least: np.clip(
                np.asarray(w, np.int64) + np.where(np.abs(v) >= least, np.sign(v), 0),
                *(-127, 127),
            ),
            weights,
            votes,
        )
        before = weights
        state, weights, figures = step(state, weights, tokens)
        np.testing.assert_array_equal(figures["losses"], losses)
        np.testing.assert_array_equal(np.asarray(state.hidden)[:, :, :, 0], hidden)
        jax.tree.map(np.testing.assert_array_equal, weights, want)
        moved = jax.tree.map(
            lambda a, b: int(np.sum(np.asarray(a) != np.asarray(b))), weights, before
        )
        assert 0 < int(figures["moved"]) == sum(jax.tree.leaves(moved))
        assert int(figures["undecided"]) == np.sum(losses[:, 0] == losses[:, 1])
    assert int(state.generation) == 32


def inverse_erfc(p):
    """x with erfc(x) = p, by bisection."""
    low, high = 0.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erfc(middle) > p else (low, middle)
    return low


def test_preferences_and_elections_by_hand():
    losses = jnp.array([[3, 5], [5, 3], [4, 4]])
    assert preferences(losses).tolist() == [1, -1, 0]
    votes = jnp.array([-7, -6, -5, 0, 5, 6, 7])
    assert elect(votes, jnp.int32(6)).tolist() == [-1, -1, 0, 0, 0, 1, 1]
    assert elect(votes, jnp.int32(0)).tolist() == [-1, -1, -1, 0, 1, 1, 1]
    e = {
        "m": Outer(jnp.array([[1, 2], [3, 4]], jnp.int8), jnp.ones((2, 3), jnp.int8)),
        "v": Product(*(jnp.array([[-63, 2], [63, 4]], jnp.int8),) * 2),
    }
    found = count_votes(e, jnp.array([1, -1], jnp.int8))
    assert found["m"].tolist() == [[-2] * 3] * 2
    assert found["v"].tolist() == [0, -12] and found["v"].dtype == jnp.int32


def test_weights_stay_within_127():
    """All that an election moves outward from the border stays there."""
    strategy, state, weights = start(size=127)
    for n in range(3):
        state, weights, _ = stepping(strategy)(state, weights, text(TINY, 2, 6, n))
        for w in jax.tree.leaves(weights):
            assert np.abs(np.asarray(w, np.int32)).max() <= 127


@pytest.mark.parametrize("generation", (0, 67, 600, 6000))
def test_without_preference_the_share_moved_is_the_tests_level(generation):
    """Votes of random signs, in matrices and in vectors, for alpha of 1 to 1 %.

    An entry's vote is a sum of P products of two normals, close to a normal. Entries
    of a row share noise, so 24 elections are averaged, and five of their deviations
    allowed beside a tenth for what the tail of so few votes has more.
    """
    es = IntegerEGGROLL(population=512, table_size=2**18, generations=10_000)
    strategy, state, weights = start(es, SMALL)
    alpha = 1 / (0.015 * generation + 1)
    assert es.share(generation) == pytest.approx(alpha)
    threshold = jnp.int32(es.threshold(generation))

    @jax.jit
    def election(number):
        now = state.replace(generation=number)
        noise = jax.vmap(strategy.noise, (None, 0))(now, jnp.arange(256))
        signs = jax.random.rademacher(jax.random.key(number), (256,), jnp.int8)
        moves = elect(count_votes(noise, signs), threshold)
        return jax.tree.map(lambda m: jnp.mean((m != 0).astype(jnp.float32)), moves)

    shares = [jax.tree.leaves(election(jnp.int32(n))) for n in range(24)]
    names = [name for name, _ in parameters.named_leaves(weights)]
    shares = np.array(shares)
    vectors = np.array(["norm" in name or "/b_" in name for name in names])
    for kind in (shares[:, vectors].mean(1), shares[:, ~vectors].mean(1)):
        error = 5 * kind.std() / math.sqrt(len(kind))
        assert abs(kind.mean() - alpha) < error + 0.1 * alpha * (alpha < 1) + 0.01


def test_the_share_falls_until_the_last_generation_named():
    es = dataclasses.replace(ES, generations=100)
    assert es.threshold(0) == 0 and es.share(0) == 1
    thresholds = [es.threshold(t) for t in range(100)]
    assert thresholds == sorted(thresholds)
    assert es.threshold(99) == es.threshold(5000)
    strategy, state, weights = start(es)
    tokens = text(TINY, 2, 6)
    state = state.replace(generation=jnp.int32(5000))
    assert int(stepping(strategy)(state, weights, tokens)[2]["moved"]) > 0


@pytest.mark.parametrize(("members_at_once", "pairs"), ((2, 1), (10, 4)))
def test_any_chunks_give_the_same(members_at_once, pairs):
    es = dataclasses.replace(ES, population=24, members_per_sequence=12)
    tokens = text(TINY, 2, 6)
    strategy, state, weights = start(es)
    want = stepping(strategy)(state, weights, tokens)
    es = dataclasses.replace(es, members_at_once=members_at_once)
    strategy, state, weights = start(es)
    assert es.at_once(es.pairs) == pairs
    found = stepping(strategy)(state, weights, tokens)
    arrays = lambda tree: jax.tree.leaves((tree[1], tree[0].hidden, tree[2]))  # noqa: E731
    for a, b in zip(arrays(found), arrays(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_eight_devices_give_the_same_to_the_bit():
    es = dataclasses.replace(ES, population=64, members_per_sequence=4)
    strategy, state, weights = start(es)
    tokens = text(TINY, 16, 6)
    one = eight = state, weights, None
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=auto)
    for _ in range(2):
        one = stepping(strategy)(one[0], one[1], tokens)
        with jax.set_mesh(mesh):
            eight = jax.jit(strategy.step)(eight[0], eight[1], tokens)
        arrays = lambda run: jax.tree.leaves((run[1], run[0].hidden, run[2]))  # noqa: E731
        for a, b in zip(arrays(one), arrays(eight), strict=True):
            np.testing.assert_array_equal(a, b)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="do not divide 4 texts"):
        other = dataclasses.replace(es, members_per_sequence=16).build(TINY)
        jax.eval_shape(other.step, state, weights, text(TINY, 4, 6))


def test_members_that_share_a_sequence_read_the_same():
    """With one text for all, whatever the number of sequences."""
    tokens = text(TINY, 1, 6)
    losses = []
    for shared in (2, 8):
        es = dataclasses.replace(ES, members_per_sequence=shared)
        strategy, state, weights = start(es)
        rows = np.repeat(tokens, 8 // shared, 0)
        losses.append(stepping(strategy)(state, weights, rows)[2]["losses"])
    np.testing.assert_array_equal(losses[0], losses[1])


def test_a_population_learns_a_short_text_by_heart():
    """From 3.5 bits a token of a vocabulary of 11 to less than one."""
    es = IntegerEGGROLL(population=256, members_per_sequence=256, table_size=2**18)
    strategy, state, weights = start(es, SMALL)
    period = np.array([10, 1, 5, 2, 5, 3, 5, 4], np.int32)
    tokens = np.resize(period, (1, 17))
    step = stepping(strategy)

    def bits_a_token(weights):
        fresh = model.init_state(SMALL, 1)
        return model.bits(segment_loss(weights, tokens, SMALL, fresh)[0]) / 16

    assert bits_a_token(weights) > 3
    for _ in range(80):
        state, weights, _ = step(state, weights, tokens)
    assert bits_a_token(weights) < 1


# Nothing but integers -----------------------------------------------------------------


def inexact(jaxpr):
    """All values of a program, inner programs too, that are no integers."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    values = [*jaxpr.invars, *jaxpr.constvars, *jaxpr.outvars]
    found = []
    for equation in jaxpr.eqns:
        values += [*equation.invars, *equation.outvars]
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found += inexact(inner)
    dtypes = [value.aval.dtype for value in values if hasattr(value.aval, "dtype")]
    return found + [d for d in dtypes if jnp.issubdtype(d, jnp.inexact)]


def test_the_training_step_holds_nothing_but_integers():
    """In the traced program and in the one handed to the compiler."""
    strategy, state, weights = start()
    tokens = text(TINY, 2, 6)
    assert inexact(jax.make_jaxpr(strategy.step)(state, weights, tokens)) == []
    lowered = jax.jit(strategy.step).lower(state, weights, tokens).as_text()
    assert re.findall(r"\b(?:x|<)(?:b?f\d|complex)", lowered) == []
    assert "xi8>" in lowered


def test_the_search_for_floats_finds_them_however_deep():
    half = lambda x: (x.astype(jnp.float32) / 2).astype(jnp.int32)  # noqa: E731
    programs = (
        half,
        jax.jit(jax.vmap(half)),
        lambda x: jax.lax.scan(lambda c, y: (c, half(y)), x[0], x)[1],
        lambda x: jax.lax.cond(x[0] > 0, half, lambda x: x, x),
        lambda x: jax.lax.while_loop(lambda x: x[0] > 9, half, x),
        lambda x: jax.lax.fori_loop(0, 2, lambda _, x: jax.jit(half)(x), x),
    )
    for program in programs:
        traced = jax.make_jaxpr(program)(jnp.arange(3))
        assert jnp.dtype(jnp.float32) in inexact(traced)
        lowered = jax.jit(program).lower(jnp.arange(3)).as_text()
        assert re.findall(r"(?:x|<)(?:b?f\d|complex)", lowered)
    assert inexact(jax.make_jaxpr(lambda x: x * 2 > 1)(jnp.arange(3))) == []


# Errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"population": 7}, "population is 7, .* make it even"),
        ({"population": 2**21}, "population is 2097152, .* to 1048576"),
        ({"members_per_sequence": 3}, "members_per_sequence is 3, but must be even"),
        ({"members_per_sequence": 0}, "members_per_sequence is 0, .* at least 2"),
        ({"members_per_sequence": 6}, "is 6, which does not divide a population of 8"),
        ({"members_at_once": 1}, "members_at_once is 1, but must be at least 2"),
        ({"sigma_shift": -1}, "sigma_shift is -1, but must be 0 to 16"),
        ({"decay": -0.5}, "decay is -0.5, but must be at least 0"),
        ({"generations": 0}, "generations is 0, but must be at least 1"),
        ({"table_size": 1000}, "table_size is 1000, but must be a power of 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ES, **change)


def test_what_does_not_fit_is_refused():
    strategy, state, weights = start()
    with pytest.raises(ValueError, match="table_size is 64, but one direction takes"):
        dataclasses.replace(ES, table_size=64).build(TINY)
    with pytest.raises(TypeError, match="embedding is float32, but .* are int8"):
        floats = weights | {"embedding": weights["embedding"].astype(jnp.float32)}
        strategy.init(floats, KEY)
    with pytest.raises(ValueError, match=r"norm has the shape \(5,\), but .* \(4,\)"):
        strategy.init(weights | {"norm": jnp.zeros(5, jnp.int8)}, KEY)
    with pytest.raises(ValueError, match="norm holds -128"):
        strategy.init(weights | {"norm": jnp.full(4, -128, jnp.int8)}, KEY)
    for shape in ((3, 6), (2, 1), (2,)):
        message = re.escape(
            f"tokens have the shape {shape}, but 8 members with 4 a text"
        )
        with pytest.raises(ValueError, match=message):
            strategy.step(state, weights, np.zeros(shape, np.int32))
