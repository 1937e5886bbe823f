"""EGGROLL: its members, its estimator, and the same update on any devices."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import params as parameters
from jaxlab.evolution import (
    EGGROLL,
    CentredRanks,
    Decay,
    GroupZScore,
    Raw,
    Sign,
    State,
    ZScore,
    es_value_and_grad,
    noise,
)
from jaxlab.params import LowRank, ParamSpec, linear, quantize, value

SPECS = {
    "w": ParamSpec((6, 4), (None, None)),
    "stack": ParamSpec((3, 4, 4), ("layers", None, None)),
    "scale": ParamSpec((4,), (None,), jax.nn.initializers.ones, role="scale"),
    "table": ParamSpec((5, 6), (None, None), role="embedding"),
}
KEY = jax.random.key(7)


def start(es, specs=SPECS, optimizer=None):
    strategy = es.build(specs, optimizer or optax.sgd(0.1))
    weights = parameters.init(specs, jax.random.key(1))
    return strategy, weights, strategy.init(weights, KEY)


def dense(member):
    return jax.tree.map(value, member, is_leaf=lambda x: isinstance(x, LowRank))


def member(strategy, state, weights, number):
    """One member, by itself."""
    stacked, axes = strategy.ask(state, weights, jnp.asarray([number]))
    return jax.vmap(dense, in_axes=(axes,))(stacked)


@pytest.mark.parametrize("rank", (1, 3, None))
def test_an_antithetic_pair_is_opposite_about_the_base(rank):
    strategy, weights, state = start(EGGROLL(population=8, rank=rank, sigma=0.3))
    plus, minus = (member(strategy, state, weights, n) for n in (4, 5))

    def opposite(p, m, w):
        np.testing.assert_allclose((p[0] + m[0]) / 2, w, rtol=1e-5, atol=1e-6)
        assert float(jnp.abs(p[0] - w).max()) > 0.01

    jax.tree.map(opposite, plus, minus, weights)
    if rank is not None:
        moved = np.asarray(plus["w"][0] - weights["w"])
        assert np.linalg.matrix_rank(moved, tol=1e-4) == rank


def test_members_are_low_rank_leaves_that_share_their_base():
    strategy, weights, state = start(EGGROLL(population=8))
    stacked, axes = strategy.ask(state, weights)
    assert isinstance(stacked["w"], LowRank) and stacked["w"].w is not None
    assert stacked["w"].w.shape == (6, 4) and stacked["w"].a.shape == (8, 6, 1)
    assert axes["w"].w is None and axes["scale"] == 0
    x = jnp.ones((2, 6))
    y = jax.vmap(lambda w: linear(x, w["w"]), in_axes=(axes,))(stacked)
    whole = jax.vmap(dense, in_axes=(axes,))(stacked)["w"]
    np.testing.assert_allclose(y, x @ whole, rtol=1e-5, atol=1e-6)


def test_entries_have_variance_sigma_squared_for_any_rank():
    specs = {"w": ParamSpec((40, 50), (None, None))}
    for rank in (1, 4, None):
        es = EGGROLL(population=64, rank=rank, sigma=0.5, antithetic=False)
        strategy, weights, state = start(es, specs)
        stacked, axes = strategy.ask(state, weights)
        moved = jax.vmap(dense, in_axes=(axes,))(stacked)["w"] - weights["w"][None]
        assert float(moved.std()) == pytest.approx(0.5, rel=0.05)


def test_noise_is_normal():
    """Moments and tails within five of their deviations; the two of a word apart."""
    n = 400_001  # odd: half of the last word is left over
    x = np.asarray(noise._normal(KEY, (n,)), np.float64)
    for power, want, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(x**power) - want) < 5 * math.sqrt(spread / n)
    for edge in (0.5, 1, 2, 3):
        share = math.erfc(edge / math.sqrt(2))
        assert abs(np.mean(abs(x) > edge) - share) < 5 * math.sqrt(share / n)
    half = (n + 1) // 2
    first, second = x[: n - half], x[half:]
    for power in (1, 2):
        correlation = np.corrcoef(first**power, second**power)[0, 1]
        assert abs(correlation) < 5 / math.sqrt(half)
    assert 4 < abs(x).max() < 4.4


def test_noise_is_new_each_generation_and_lives_as_long_as_said():
    def drawn(es, generation):
        strategy, weights, state = start(es)
        state = state.replace(generation=jnp.int32(generation))
        return np.asarray(member(strategy, state, weights, 2)["w"])

    es = EGGROLL(population=4)
    assert not np.allclose(drawn(es, 0), drawn(es, 1))
    lasting = dataclasses.replace(es, noise_lifetime=3)
    np.testing.assert_array_equal(drawn(lasting, 0), drawn(lasting, 2))
    assert not np.allclose(drawn(lasting, 2), drawn(lasting, 3))


def test_sigma_may_be_a_function_of_the_generation():
    weights = {"w": jnp.zeros((6, 4))}

    def steps(sigma, generation):
        strategy = EGGROLL(population=4, sigma=sigma).build(weights, optax.sgd(0.1))
        state = strategy.init(weights, KEY).replace(generation=jnp.int32(generation))
        return member(strategy, state, weights, 0)["w"]

    falling = Decay(0.4, 0.5, least=0.05)
    np.testing.assert_allclose(steps(falling, 2), steps(0.1, 2), rtol=1e-6)
    np.testing.assert_allclose(steps(falling, 9), steps(0.05, 9), rtol=1e-6)
    with pytest.raises(ValueError, match="not a step that falls"):
        Decay(rate=2.0)


def test_the_update_is_the_weighted_sum_of_the_noise():
    """In chunks too, with either scaling; the oracle sums dense members in float64."""
    for chunk, scaling in ((1024, "unbiased"), (3, "unbiased"), (3, "paper")):
        es = EGGROLL(
            *(16, 2, 0.1), scaling=scaling, directions_at_once=chunk, shape=Raw()
        )
        strategy, weights, state = start(es, optimizer=optax.sgd(1.0))
        z = np.random.default_rng(0).standard_normal(16)
        state_after, new, _ = strategy.tell(state, weights, jnp.asarray(z, jnp.float32))
        stacked, axes = strategy.ask(state, weights)
        whole = jax.vmap(dense, in_axes=(axes,))(stacked)
        factor = 1 / 0.1 if scaling == "unbiased" else 0.1 * math.sqrt(16)
        for name, w in weights.items():
            noise = (np.asarray(whole[name], np.float64) - np.asarray(w)) / 0.1
            want = factor / 16 * np.einsum("n,n...->...", z, noise)
            got = np.asarray(new[name]) - np.asarray(w)
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
        assert int(state_after.generation) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "n"), ((1, 128), (4, 128), (None, 64)))
@pytest.mark.parametrize(("share", "seeds"), ((1 / 16, 32), (1 / 4, 8)))
def test_the_cosine_to_the_gradient_is_what_theory_says(
    rank, n, share, seeds, optimized
):
    """sqrt(P / (P + d)) for P antithetic pairs and d parameters, within 3%.

    A seed's own spread is about 1 / sqrt(d). Rank 1 has heavier tails, as if d were
    (1 + 2 / in)(1 + 2 / out) times as many, so the law wants large matrices.
    """
    d = n * n
    pairs = round(share * d)
    target = jax.random.normal(jax.random.key(5), (n, n))
    specs = {"w": ParamSpec((n, n), (None, None))}
    es = EGGROLL(
        *(2 * pairs, rank),
        **{"sigma": 1e-3, "shape": Raw(), "directions_at_once": 256},
        members_at_once=512,
    )

    def fitness(weights, key):
        """A linear function, whose gradient is the target."""
        return jnp.sum(linear(jnp.eye(n), weights["w"]) * target) / d

    estimate = jax.jit(
        es_value_and_grad(fitness, es, specs), compiler_options=optimized
    )
    cosines = []
    for seed in range(seeds):
        state = State(jax.random.key(seed), jnp.int32(0))
        _, g, _ = estimate({"w": jnp.zeros((n, n))}, state)
        cosine = jnp.vdot(g["w"], target)
        cosines.append(cosine / jnp.linalg.norm(g["w"]) / jnp.linalg.norm(target))
    theory = math.sqrt(pairs / (pairs + d))
    assert float(np.mean(cosines)) == pytest.approx(theory, rel=0.03)


def quadratic(weights, key):
    sums = jax.tree.leaves(
        jax.tree.map(
            lambda w: -jnp.sum((value(w) - 1.0) ** 2),
            weights,
            is_leaf=lambda x: isinstance(x, LowRank),
        )
    )
    noise = 0.0 if key is None else 0.01 * jax.random.normal(key)
    return sum(sums) + noise


@pytest.mark.parametrize("update", ("replicated", "sharded"))
def test_eight_devices_make_the_update_of_one(update):
    es = EGGROLL(population=32, sigma=0.1, update=update)
    strategy, weights, state = start(es, optimizer=optax.adam(0.1))
    step = jax.jit(lambda s, w: strategy.step(s, w, quadratic))
    _, want, found = step(state, weights)
    auto = (jax.sharding.AxisType.Auto,) * 2
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=auto)):
        _, got, of_mesh = step(state, weights)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want
    )
    np.testing.assert_allclose(of_mesh["fitness"], found["fitness"], rtol=1e-5)


@pytest.mark.parametrize("antithetic", (True, False))
def test_step_is_ask_and_tell_however_many_at_once(antithetic):
    es = EGGROLL(population=10, antithetic=antithetic, shape=CentredRanks())
    strategy, weights, state = start(es)
    stacked, axes = strategy.ask(state, weights)
    fitness = jax.vmap(lambda w: quadratic(w, None), (axes,))(stacked)
    _, want, found = strategy.tell(state, weights, fitness)
    for at_once in (None, 4, 10):
        one = dataclasses.replace(es, members_at_once=at_once)
        strategy = one.build(SPECS, optax.sgd(0.1))
        _, got, of_step = strategy.step(state, weights, lambda w, _: quadratic(w, None))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            *(got, want),
        )
        assert float(of_step["fitness"]) == pytest.approx(float(found["fitness"]))


@pytest.mark.parametrize("antithetic", (True, False))
@pytest.mark.parametrize("rank", (2, None))
def test_map_is_vmap_over_members(rank, antithetic):
    """In their order, with what each has of its own, a tree or none."""
    es = EGGROLL(population=6, rank=rank, antithetic=antithetic)
    strategy, weights, state = start(es)
    own = {"x": jax.random.normal(KEY, (6, 3, 6)), "y": jnp.arange(6.0)}

    def function(w, own):
        return {"z": linear(own["x"], w["w"]) * w["scale"][None], "y": own["y"]}

    stacked, axes = strategy.ask(state, weights)
    want = jax.vmap(function, (axes, 0))(stacked, own)
    got = strategy.map(function, state, weights, own)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want
    )
    alone = strategy.map(lambda w: w["scale"].sum(), state, weights)
    np.testing.assert_allclose(
        alone, jax.vmap(lambda w: w["scale"].sum(), (axes,))(stacked), rtol=1e-5
    )


def test_ask_and_tell_climb():
    strategy, weights, state = start(EGGROLL(population=128), optimizer=optax.adam(0.1))

    @jax.jit
    def generation(state, weights):
        stacked, axes = strategy.ask(state, weights)
        fitness = jax.vmap(quadratic, in_axes=(axes, None))(stacked, KEY)
        return strategy.tell(state, weights, fitness)

    first = quadratic(weights, KEY)
    for _ in range(60):
        state, weights, found = generation(state, weights)
    assert quadratic(weights, KEY) > 0.05 * first and not found["no_signal"]


def test_a_quantized_base_climbs_on_its_grid():
    specs = {"w": ParamSpec((6, 4), (None, None))}
    weights = {"w": quantize(jax.random.normal(KEY, (6, 4)))}
    scale = weights["w"].scale
    target = quantize(jax.random.normal(jax.random.key(3), (6, 4))).q
    target = target.astype(jnp.float32)

    def fitness(w, key):
        return -jnp.sum((linear(jnp.eye(6), w["w"]) / scale - target) ** 2)

    es = EGGROLL(population=256, sigma=0.01)
    strategy = es.build(specs, optax.sgd(5e-4))
    state = strategy.init(weights, KEY)
    step = jax.jit(lambda s, w: strategy.step(s, w, fitness))
    first = fitness(weights, KEY)
    for _ in range(100):
        state, weights, _ = step(state, weights)
    assert weights["w"].q.dtype == jnp.int8
    np.testing.assert_array_equal(weights["w"].scale, scale)
    assert fitness(weights, KEY) > 0.1 * first


def test_a_quantized_step_is_right_on_average():
    """A step of 0.3 of the grid moves three entries in ten by one."""
    weights = {"w": quantize(jnp.ones((100, 100)).at[0].set(2.0))}
    specs = {"w": ParamSpec((100, 100), (None, None))}
    scale = float(weights["w"].scale[0, 0])
    constant = optax.stateless(
        lambda g, w: jax.tree.map(lambda w: jnp.full_like(w, 0.3 * scale), w)
    )
    strategy = EGGROLL(population=2).build(specs, constant)
    _, new, _ = strategy.tell(strategy.init(weights, KEY), weights, jnp.arange(2.0))
    step = (new["w"].q - weights["w"].q)[1:]
    assert set(np.unique(step)) == {0, 1}
    assert float(step.mean()) == pytest.approx(0.3, abs=0.02)


def test_frozen_parameters_have_neither_noise_nor_gradient():
    es = EGGROLL(population=8, frozen=("scale", "table"))
    strategy, weights, state = start(es)
    moved = member(strategy, state, weights, 1)
    for name in ("scale", "table"):
        np.testing.assert_array_equal(
            moved[name].reshape(weights[name].shape), weights[name]
        )
    _, new, _ = strategy.tell(state, weights, jnp.arange(8.0))
    for name in ("scale", "table"):
        np.testing.assert_array_equal(new[name], weights[name])
    assert not np.allclose(new["w"], weights["w"])


def test_a_frozen_parameter_is_not_decayed_and_a_quantized_one_does_not_drift():
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    q = quantize(jax.random.normal(KEY, (100, 100)))
    weights = {"scale": jnp.ones(4), "q": q, "w": jnp.ones((4, 4))}
    specs = {
        "scale": ParamSpec((4,), (None,), role="scale"),
        "q": ParamSpec((100, 100), (None, None)),
        "w": ParamSpec((4, 4), (None, None)),
    }
    for frozen, chosen in ((("scale", "q"), optimizer), (("scale",), optax.sgd(0.0))):
        strategy = EGGROLL(population=8, frozen=frozen).build(specs, chosen)
        state, moved = strategy.init(weights, KEY), weights
        for _ in range(3):
            state, moved, _ = strategy.tell(state, moved, jnp.arange(8.0))
        np.testing.assert_array_equal(moved["scale"], weights["scale"])
        np.testing.assert_array_equal(moved["q"].q, q.q)


@pytest.mark.parametrize("shape", (Raw(), ZScore(), CentredRanks()))
def test_equal_fitness_moves_nothing(shape):
    """Within jit, where nothing can be refused; Adam would scale up any rounding."""
    es = EGGROLL(population=10, antithetic=False, shape=shape)
    strategy, weights, state = start(es, optimizer=optax.adam(0.1))
    equal = lambda w, key: jnp.float32(0.1)  # noqa: E731
    _, new, found = jax.jit(lambda s, w: strategy.step(s, w, equal))(state, weights)
    jax.tree.map(np.testing.assert_array_equal, new, weights)
    assert found["no_signal"] == 1


def test_bfloat16_parameters_and_fitness():
    es = EGGROLL(population=16, sigma=0.1)
    strategy = es.build(SPECS, optax.adam(0.1))
    weights = parameters.init(SPECS, jax.random.key(1))
    weights = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)

    def fitness(w, key):
        return -jnp.sum(linear(jnp.ones((1, 6), jnp.bfloat16), w["w"]) ** 2)

    state = strategy.init(weights, KEY)
    _, new, _ = jax.jit(lambda s, w: strategy.step(s, w, fitness))(state, weights)
    assert {w.dtype for w in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}
    assert not jnp.array_equal(new["w"], weights["w"])


def test_shaping():
    f = jnp.asarray([3.0, 1.0, jnp.nan, 1.0, 7.0, -jnp.inf])
    ranks = CentredRanks()(f)
    np.testing.assert_allclose(ranks, [0.3, -0.2, -0.2, -0.2, 0.5, -0.2], atol=1e-6)
    z = ZScore()(f)
    assert float(z.mean()) == pytest.approx(0, abs=1e-6) and float(z[2]) == float(z[1])
    np.testing.assert_array_equal(Sign()(f), [0.5, -0.5, 0, 0, 0.5, -0.5])
    grouped = GroupZScore(3)(jnp.asarray([1.0, 2.0, 3.0, 11.0, 12.0, 13.0]))
    np.testing.assert_allclose(grouped[:3], grouped[3:], atol=1e-6)
    assert not np.any(ZScore()(jnp.full(4, jnp.nan)))
    counts, numbers = jnp.asarray([3, 0, 2, 2]), jnp.asarray([3.0, 0.0, 2.0, 2.0])
    for shape in (Raw(), ZScore(), CentredRanks(), GroupZScore(2)):
        np.testing.assert_array_equal(shape(counts), shape(numbers))


@pytest.mark.parametrize(
    ("changed", "message"),
    (
        ({"population": 7}, "population is 7, but must be even"),
        ({"population": 0}, "population is 0, but must be at least 2"),
        ({"population": 1, "antithetic": False}, "one member has nobody"),
        ({"rank": 0}, "rank is 0"),
        ({"sigma": 0.0}, "sigma is 0.0"),
        ({"noise_lifetime": 0}, "noise_lifetime is 0"),
        ({"scaling": "both"}, "scaling is 'both'"),
        ({"shape": Sign(), "antithetic": False}, "antithetic"),
    ),
)
def test_settings_that_cannot_be(changed, message):
    with pytest.raises(ValueError, match=message):
        EGGROLL(**changed)


def test_errors_name_what_is_wrong():
    strategy, weights, state = start(EGGROLL(population=8))
    with pytest.raises(ValueError, match=r"of one member has shape \(2,\)"):
        strategy.step(state, weights, lambda w, key: jnp.ones(2))
    with pytest.raises(ValueError, match="3 members, but must have at least 2 and"):
        EGGROLL(population=8, shape=GroupZScore(3))
    with pytest.raises(ValueError, match=r"shape \(4,\), but a population of 8"):
        strategy.tell(state, weights, jnp.zeros(4))
    with pytest.raises(ValueError, match="All 8 members have the fitness 2.0"):
        strategy.tell(state, weights, jnp.full(8, 2.0))
    with pytest.raises(ValueError, match="None of the 8 members has a finite"):
        strategy.tell(state, weights, jnp.full(8, jnp.nan))
    with pytest.raises(ValueError, match="Nothing can be moved"):
        EGGROLL(frozen=(".*",)).build(SPECS, optax.sgd(0.1))
    counts = {"n": jnp.zeros((3,), jnp.int32), "w": jnp.zeros((3, 3))}
    with pytest.raises(ValueError, match="n is int32, which no noise can move"):
        EGGROLL().build(counts, optax.sgd(0.1))
    EGGROLL(frozen=("n",)).build(counts, optax.sgd(0.1))
    low_rank = {"w": LowRank(jnp.ones((6, 4)), jnp.ones((6, 1)), jnp.ones((4, 1)))}
    with pytest.raises(ValueError, match="w is a LowRank, to which no step can be"):
        one = EGGROLL().build({"w": SPECS["w"]}, optax.sgd(0.1))
        one.init(low_rank, KEY)
    narrow = jax.tree.map(lambda w: 100 * w.astype(jnp.bfloat16), weights)
    with pytest.warns(UserWarning, match=r"below the resolution of .* w \(bfloat16"):
        EGGROLL(sigma=1e-3).build(SPECS, optax.sgd(0.1)).init(narrow, KEY)
