"""EGGROLL: its members, its estimator, and the same update on any devices."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
FEW = {name: SPECS[name] for name in ("w", "scale")}  # of either form of noise
KEY = jax.random.key(7)


def start(es, specs=SPECS, optimizer=None):
    strategy = es.build(specs, optimizer or optax.sgd(0.1))
    rng = np.random.default_rng(1)
    weights = {
        name: jnp.asarray(rng.standard_normal(spec.shape) / 2, jnp.float32)
        for name, spec in specs.items()
    }
    return strategy, weights, strategy.init(weights, KEY)


def dense(member):
    return jax.tree.map(value, member, is_leaf=lambda x: isinstance(x, LowRank))


def members(strategy, state, weights, numbers=None):
    """The dense parameters of members, stacked; of all without `numbers`."""
    stacked, axes = strategy.ask(state, weights, numbers)
    return jax.vmap(dense, in_axes=(axes,))(stacked)


def member_of(strategy, number):
    """The function of (state, weights) to one member, by itself, compiled."""
    return jax.jit(lambda *now: members(strategy, *now, jnp.asarray([number])))


@pytest.mark.parametrize("rank", (1, 3, None))
def test_an_antithetic_pair_is_opposite_about_the_base(rank):
    strategy, weights, state = start(EGGROLL(population=8, rank=rank, sigma=0.3))
    pair = jax.jit(lambda *now: members(strategy, *now, jnp.asarray([4, 5])))
    found = jax.device_get(pair(state, weights))

    def opposite(pair, w):
        np.testing.assert_allclose((pair[0] + pair[1]) / 2, w, rtol=1e-5, atol=1e-6)
        assert np.abs(pair[0] - w).max() > 0.01

    jax.tree.map(opposite, found, jax.device_get(weights))
    if rank is not None:
        moved = found["w"][0] - np.asarray(weights["w"])
        assert np.linalg.matrix_rank(moved, tol=1e-4) == rank


def test_members_are_low_rank_leaves_that_share_their_base():
    strategy, weights, state = start(EGGROLL(population=8))
    x = np.ones((2, 6), np.float32)

    @jax.jit
    def products(state, weights):
        stacked, axes = strategy.ask(state, weights)
        assert isinstance(stacked["w"], LowRank) and stacked["w"].w is not None
        assert stacked["w"].w.shape == (6, 4) and stacked["w"].a.shape == (8, 6, 1)
        assert axes["w"].w is None and axes["scale"] == 0
        y = jax.vmap(lambda w: linear(x, w["w"]), in_axes=(axes,))(stacked)
        return y, members(strategy, state, weights)["w"]

    y, whole = products(state, weights)
    np.testing.assert_allclose(y, x @ np.asarray(whole), rtol=1e-5, atol=1e-6)


def test_entries_have_variance_sigma_squared_for_any_rank():
    specs = {"w": ParamSpec((40, 50), (None, None))}
    for rank in (1, 4, None):
        es = EGGROLL(population=64, rank=rank, sigma=0.5, antithetic=False)
        strategy, weights, state = start(es, specs)
        whole = jax.jit(functools.partial(members, strategy))(state, weights)["w"]
        moved = np.asarray(whole) - np.asarray(weights["w"])
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
    def drawn(es):
        """A matrix of a member in each of four generations."""
        strategy, weights, state = start(es, FEW)
        one = member_of(strategy, 2)
        return [
            np.asarray(one(state.replace(generation=jnp.int32(n)), weights)["w"])
            for n in range(4)
        ]

    es = EGGROLL(population=4)
    first, second, *_ = drawn(es)
    assert not np.allclose(first, second)
    lasting = drawn(dataclasses.replace(es, noise_lifetime=3))
    np.testing.assert_array_equal(lasting[0], lasting[2])
    assert not np.allclose(lasting[2], lasting[3])


def test_sigma_may_be_a_function_of_the_generation():
    weights = {"w": jnp.zeros((6, 4))}

    def step_of(sigma):
        strategy = EGGROLL(population=4, sigma=sigma).build(weights, optax.sgd(0.1))
        state, one = jax.jit(strategy.init)(weights, KEY), member_of(strategy, 0)
        return lambda n: one(state.replace(generation=jnp.int32(n)), weights)["w"]

    falling = step_of(Decay(0.4, 0.5, least=0.05))
    np.testing.assert_allclose(falling(2), step_of(0.1)(2), rtol=1e-6)
    np.testing.assert_allclose(falling(9), step_of(0.05)(9), rtol=1e-6)
    with pytest.raises(ValueError, match="not a step that falls"):
        Decay(rate=2.0)


def test_the_update_is_the_weighted_sum_of_the_noise():
    """In chunks too, with either scaling; the oracle sums dense members in float64."""
    strategy, weights, state = start(EGGROLL(16, 2, 0.1))
    whole = jax.jit(functools.partial(members, strategy))(state, weights)
    z = np.random.default_rng(0).standard_normal(16)
    for chunk, scaling in ((1024, "unbiased"), (3, "unbiased"), (3, "paper")):
        es = EGGROLL(
            *(16, 2, 0.1), scaling=scaling, directions_at_once=chunk, shape=Raw()
        )
        strategy, weights, state = start(es, optimizer=optax.sgd(1.0))
        state_after, new, _ = jax.jit(strategy.tell)(state, weights, np.float32(z))
        factor = 1 / 0.1 if scaling == "unbiased" else 0.1 * math.sqrt(16)
        for name, w in weights.items():
            noise = (np.asarray(whole[name], np.float64) - np.asarray(w)) / 0.1
            want = factor / 16 * np.einsum("n,n...->...", z, noise)
            got = np.asarray(new[name]) - np.asarray(w)
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
        assert int(state_after.generation) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "n"), ((1, 128), (4, 128), (None, 64)))
def test_the_cosine_to_the_gradient_is_what_theory_says(rank, n, optimized):
    """sqrt(P / (P + d)) for P antithetic pairs and d parameters, within 3%.

    Of d / 16 pairs, and of four generations of them, whose mean is that of d / 4. A
    seed's own spread is about 1 / sqrt(d). Rank 1 has heavier tails, as if d were
    (1 + 2 / in)(1 + 2 / out) times as many, so the law wants large matrices.
    """
    d = n * n
    pairs, seeds, generations = d // 16, 8, 4
    target = np.random.default_rng(5).standard_normal((n, n)).astype(np.float32)
    specs = {"w": ParamSpec((n, n), (None, None))}
    es = EGGROLL(
        *(2 * pairs, rank),
        **{"sigma": 1e-3, "shape": Raw(), "directions_at_once": 256},
        members_at_once=512,
    )

    def fitness(weights, key):
        """A linear function, whose gradient is the target."""
        return jnp.sum(linear(jnp.eye(n), weights["w"]) * target) / d

    @functools.partial(jax.jit, compiler_options=optimized)
    def estimate(key, generation):
        state = State(key, generation)
        weights = {"w": jnp.zeros((n, n))}
        return es_value_and_grad(fitness, es, specs)(weights, state)[1]["w"]

    def cosine(g):
        return np.vdot(g, target) / np.linalg.norm(g) / np.linalg.norm(target)

    found = np.array(
        [
            [estimate(jax.random.key(k), jnp.int32(t)) for t in range(generations)]
            for k in range(seeds)
        ]
    )
    for estimates, p in (
        (found.reshape(-1, n, n), pairs),
        (found.mean(1), generations * pairs),
    ):
        cosines = [cosine(g) for g in estimates]
        assert np.mean(cosines) == pytest.approx(math.sqrt(p / (p + d)), rel=0.03)


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


def stepping(update):
    es = EGGROLL(population=32, sigma=0.1, update=update)
    strategy, weights, state = start(es, FEW, optax.adam(0.1))
    return jax.jit(lambda s, w: strategy.step(s, w, quadratic)), state, weights


@functools.cache
def step_of_one_device():
    step, state, weights = stepping("replicated")
    return step(state, weights)


@pytest.mark.parametrize("update", ("replicated", "sharded"))
def test_eight_devices_make_the_update_of_one(update):
    _, want, found = step_of_one_device()
    step, state, weights = stepping(update)
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
    strategy, weights, state = start(es, FEW)

    @jax.jit
    def generation(state, weights):
        stacked, axes = strategy.ask(state, weights)
        fitness = jax.vmap(lambda w: quadratic(w, None), (axes,))(stacked)
        return strategy.tell(state, weights, fitness)

    _, want, found = generation(state, weights)
    for at_once in (None, 4, 10):
        one = dataclasses.replace(es, members_at_once=at_once)
        step = jax.jit(one.build(FEW, optax.sgd(0.1)).step, static_argnums=2)
        _, got, of_step = step(state, weights, lambda w, _: quadratic(w, None))
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
    strategy, weights, state = start(es, FEW)
    x = np.random.default_rng(0).standard_normal((6, 3, 6)).astype(np.float32)
    own = {"x": x, "y": np.arange(6, dtype=np.float32)}

    def function(w, own):
        return {"z": linear(own["x"], w["w"]) * w["scale"][None], "y": own["y"]}

    def alone(w):
        return w["scale"].sum()

    @jax.jit
    def mapped(state, weights, own):
        found = strategy.map(function, state, weights, own)
        return found, strategy.map(alone, state, weights)

    @jax.jit
    def over_asked(state, weights, own):
        stacked, axes = strategy.ask(state, weights)
        found = jax.vmap(function, (axes, 0))(stacked, own)
        return found, jax.vmap(alone, (axes,))(stacked)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        mapped(state, weights, own),
        over_asked(state, weights, own),
    )


def test_ask_and_tell_climb():
    strategy, weights, state = start(EGGROLL(population=128), optimizer=optax.adam(0.1))

    @jax.jit
    def generation(state, weights):
        stacked, axes = strategy.ask(state, weights)
        fitness = jax.vmap(quadratic, in_axes=(axes, None))(stacked, KEY)
        return strategy.tell(state, weights, fitness)

    of_base = jax.jit(quadratic)
    first = of_base(weights, KEY)
    for _ in range(60):
        state, weights, found = generation(state, weights)
    assert float(of_base(weights, KEY)) > 0.05 * float(first)
    assert not found["no_signal"]


def test_a_quantized_base_climbs_on_its_grid():
    specs = {"w": ParamSpec((6, 4), (None, None))}
    drawn = jax.jit(lambda key: quantize(jax.random.normal(key, (6, 4))))
    weights = {"w": drawn(KEY)}
    scale = np.asarray(weights["w"].scale)
    target = np.asarray(drawn(jax.random.key(3)).q, np.float32)

    def fitness(w, key):
        return -jnp.sum((linear(jnp.eye(6), w["w"]) / scale - target) ** 2)

    es = EGGROLL(population=256, sigma=0.01)
    strategy = es.build(specs, optax.sgd(5e-4))
    state = strategy.init(weights, KEY)
    step = jax.jit(lambda s, w: strategy.step(s, w, fitness))
    of_base = jax.jit(fitness)
    first = float(of_base(weights, KEY))
    for _ in range(100):
        state, weights, _ = step(state, weights)
    assert weights["w"].q.dtype == jnp.int8
    np.testing.assert_array_equal(weights["w"].scale, scale)
    assert float(of_base(weights, KEY)) > 0.1 * first


def test_a_quantized_step_is_right_on_average():
    """A step of 0.3 of the grid moves three entries in ten by one."""
    base = np.ones((100, 100), np.float32)
    base[0] = 2
    weights = {"w": jax.jit(quantize)(base)}
    specs = {"w": ParamSpec((100, 100), (None, None))}
    scale = float(weights["w"].scale[0, 0])
    constant = optax.stateless(
        lambda g, w: jax.tree.map(lambda w: jnp.full_like(w, 0.3 * scale), w)
    )
    strategy = EGGROLL(population=2).build(specs, constant)
    # Outside of `jax.jit`, where fitness is looked at.
    _, new, _ = strategy.tell(strategy.init(weights, KEY), weights, jnp.arange(2.0))
    step = (np.asarray(new["w"].q) - np.asarray(weights["w"].q))[1:]
    assert set(np.unique(step)) == {0, 1}
    assert float(step.mean()) == pytest.approx(0.3, abs=0.02)


def test_frozen_parameters_have_neither_noise_nor_gradient():
    es = EGGROLL(population=8, frozen=("scale", "table"))
    strategy, weights, state = start(es)
    moved = member_of(strategy, 1)(state, weights)
    for name in ("scale", "table"):
        np.testing.assert_array_equal(
            moved[name].reshape(weights[name].shape), weights[name]
        )
    _, new, _ = jax.jit(strategy.tell)(state, weights, np.arange(8.0))
    for name in ("scale", "table"):
        np.testing.assert_array_equal(new[name], weights[name])
    assert not np.allclose(new["w"], weights["w"])


def test_a_frozen_parameter_is_not_decayed_and_a_quantized_one_does_not_drift():
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    rng = np.random.default_rng(0)
    q = jax.jit(quantize)(rng.standard_normal((100, 100)).astype(np.float32))
    weights = {"scale": jnp.ones(4), "q": q, "w": jnp.ones((4, 4))}
    specs = {
        "scale": ParamSpec((4,), (None,), role="scale"),
        "q": ParamSpec((100, 100), (None, None)),
        "w": ParamSpec((4, 4), (None, None)),
    }
    for frozen, chosen in ((("scale", "q"), optimizer), (("scale",), optax.sgd(0.0))):
        strategy = EGGROLL(population=8, frozen=frozen).build(specs, chosen)
        state, moved = strategy.init(weights, KEY), weights
        tell = jax.jit(strategy.tell)
        for _ in range(3):
            state, moved, _ = tell(state, moved, np.arange(8.0))
        np.testing.assert_array_equal(moved["scale"], weights["scale"])
        np.testing.assert_array_equal(moved["q"].q, q.q)


@pytest.mark.parametrize("shape", (Raw(), ZScore(), CentredRanks()))
def test_equal_fitness_moves_nothing(shape):
    """Within jit, where nothing can be refused; Adam would scale up any rounding."""
    es = EGGROLL(population=10, antithetic=False, shape=shape)
    strategy, weights, state = start(es, FEW, optax.adam(0.1))
    equal = lambda w, key: jnp.float32(0.1)  # noqa: E731
    _, new, found = jax.jit(lambda s, w: strategy.step(s, w, equal))(state, weights)
    jax.tree.map(np.testing.assert_array_equal, new, weights)
    assert found["no_signal"] == 1


def test_bfloat16_parameters_and_fitness():
    es = EGGROLL(population=16, sigma=0.1)
    strategy, weights, _ = start(es, optimizer=optax.adam(0.1))
    weights = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)

    def fitness(w, key):
        return -jnp.sum(linear(jnp.ones((1, 6), jnp.bfloat16), w["w"]) ** 2)

    state = strategy.init(weights, KEY)
    _, new, _ = jax.jit(lambda s, w: strategy.step(s, w, fitness))(state, weights)
    assert {w.dtype for w in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}
    assert np.any(np.asarray(new["w"]) != np.asarray(weights["w"]))


def test_shaping():
    shaped = jax.jit(lambda shape, f: shape(f), static_argnums=0)
    f = np.float32([3.0, 1.0, np.nan, 1.0, 7.0, -np.inf])
    ranks = shaped(CentredRanks(), f)
    np.testing.assert_allclose(ranks, [0.3, -0.2, -0.2, -0.2, 0.5, -0.2], atol=1e-6)
    z = np.asarray(shaped(ZScore(), f))
    assert float(z.mean()) == pytest.approx(0, abs=1e-6) and float(z[2]) == float(z[1])
    np.testing.assert_array_equal(shaped(Sign(), f), [0.5, -0.5, 0, 0, 0.5, -0.5])
    grouped = shaped(GroupZScore(3), np.float32([1, 2, 3, 11, 12, 13]))
    grouped = np.asarray(grouped)
    np.testing.assert_allclose(grouped[:3], grouped[3:], atol=1e-6)
    assert not np.any(shaped(ZScore(), np.full(6, np.nan, np.float32)))
    counts = np.int32([3, 0, 2, 2, 1, 1])
    for shape in (Raw(), ZScore(), CentredRanks(), GroupZScore(3)):
        np.testing.assert_array_equal(
            shaped(shape, counts), shaped(shape, np.float32(counts))
        )


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
    strategy, weights, state = start(EGGROLL(population=8), FEW)
    with pytest.raises(ValueError, match=r"of one member has shape \(2,\)"):
        strategy.step(state, weights, lambda w, key: jnp.ones(2))
    with pytest.raises(ValueError, match="3 members, but must have at least 2 and"):
        EGGROLL(population=8, shape=GroupZScore(3))
    with pytest.raises(ValueError, match=r"shape \(4,\), but a population of 8"):
        strategy.tell(state, weights, jnp.zeros(4))
    with pytest.raises(ValueError, match="All 8 members have the fitness 2.0"):
        strategy.tell(state, weights, jnp.full(8, 2.0))
    with pytest.raises(ValueError, match="All 8 members have the fitness 2.0"):
        strategy.step(state, weights, lambda w, key: jnp.float32(2.0))
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
        EGGROLL(sigma=1e-3).build(FEW, optax.sgd(0.1)).init(narrow, KEY)
