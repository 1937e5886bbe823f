"""GRPO: its loss by loops, its gradient by enumeration, and that it learns."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import models, rl
from jaxlab.mixers import attention, delta_product
from jaxlab.models import LMConfig
from jaxlab.rl import GRPO
from jaxlab.rl.grpo import (
    PolicyGradient,
    advantages,
    k3,
    policy_loss,
    token_average,
)

CFG = LMConfig(
    vocab_size=8, width=32, n_layers=1, pattern=(delta_product.Config(32, n_heads=2),)
)
SMALL = LMConfig(8, 8, 1, pattern=(attention.Config(8, n_heads=2),))
KEY = jax.random.key(3)


@functools.partial(jax.jit, static_argnames="cfg")
def weights_of(cfg, seed):
    return models.init(cfg, jax.random.key(seed))


# Every sign of advantage with ratios below, inside and above the bounds.
RATIOS = np.array([[0.5, 1.0, 1.1], [1.7, 0.9, 3.0], [0.3, 1.05, 2.0], [1.5, 0.7, 1.0]])
MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]], np.float64)
ADVANTAGES = np.array([1.3, 0.4, -0.8, -2.0])
OLD = -np.linspace(0.5, 2.5, 12).reshape(4, 3)
NEW = OLD + np.log(RATIOS)


def loop_loss(new, old, advantage, mask, below, above, average):
    """The paper's sum, token by token in float64; and the share at a bound."""
    rows, width = mask.shape
    of_rows, of_tokens, bound = [], [], []
    for i in range(rows):
        gains = []
        for t in range(width):
            if not mask[i, t]:
                continue
            rho, a = float(np.exp(new[i, t] - old[i, t])), advantage[i]
            if a >= 0:
                gains.append(a * min(rho, 1 + above))
                bound.append(a > 0 and rho > 1 + above)
            else:
                gains.append(a * max(rho, 1 - below))
                bound.append(rho < 1 - below)
        of_rows.append(sum(gains) / len(gains))
        of_tokens += gains
    total = {
        "sequence": sum(of_rows) / rows,
        "token": sum(of_tokens) / len(of_tokens),
        "constant": sum(of_tokens) / (rows * width),
    }
    return -total[average], sum(bound) / len(bound)


def f32(*arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


@pytest.mark.parametrize("average", ("sequence", "token", "constant"))
@pytest.mark.parametrize("above", (0.2, 0.6))
def test_the_loss_and_its_gradient_are_the_papers(average, above):
    settings = {"below": 0.2, "above": above, "average": average}
    arrays = f32(NEW, OLD, ADVANTAGES, MASK)
    (loss, figures), g = jax.value_and_grad(
        lambda *a: policy_loss(*a, **settings), has_aux=True
    )(*arrays)
    of = lambda new: loop_loss(new, OLD, ADVANTAGES, MASK, 0.2, above, average)  # noqa: E731
    want, share = of(NEW)
    assert float(loss) == pytest.approx(want, rel=1e-5)
    assert float(figures["clipped"]) == pytest.approx(share) and share > 0.2
    for place in itertools.product(range(4), range(3)):
        h = np.zeros((4, 3))
        h[place] = 1e-6
        slope = (of(NEW + h)[0] - of(NEW - h)[0]) / 2e-6
        assert float(g[place]) == pytest.approx(slope, rel=1e-4, abs=1e-6), place


def test_a_bound_stops_only_what_would_go_further():
    """Rows of advantage +, -; ratios far below, at 1, far above."""
    old = np.zeros((2, 3))
    new = np.log([[0.2, 1.0, 5.0]] * 2)
    given = f32(old, [1, -1], old + 1)
    slope = jax.jit(jax.grad(lambda n: policy_loss(n, *given)[0]))
    stopped = np.asarray(slope(*f32(new))) == 0
    np.testing.assert_array_equal(stopped, [[False, False, True], [True, False, False]])


def test_behind_the_end_anything_may_stand():
    """NaN too: neither the loss, the gradient nor the figures know of it."""
    dirty = [np.where(MASK > 0, a, np.nan) for a in (NEW, OLD)]
    loss = lambda *a: policy_loss(*a)  # noqa: E731
    grad = jax.value_and_grad(loss, has_aux=True)
    clean = grad(*f32(NEW, OLD, ADVANTAGES, MASK))
    found = grad(*f32(*dirty, ADVANTAGES, MASK))
    jax.tree.map(np.testing.assert_array_equal, clean, found)
    assert not np.any(np.asarray(found[1])[MASK == 0])


@pytest.mark.parametrize(("log_ratio", "advantage"), ((99.0, 2.0), (-99.0, -2.0)))
def test_a_bound_stops_a_ratio_that_overflows(log_ratio, advantage):
    loss = lambda new: policy_loss(new, *f32([[0.0, 0.0]], [advantage], [[1, 1]]))[0]  # noqa: E731
    value, slope = jax.jit(jax.value_and_grad(loss))(*f32([[log_ratio, 0.0]]))
    bound = advantage * (1.2 if advantage > 0 else 0.8)
    assert float(value) == pytest.approx(-(bound + advantage) / 2)
    np.testing.assert_allclose(slope, [[0.0, -advantage / 2]])


def test_a_reference_may_be_anything_behind_the_end():
    """NaN, and numbers of which the exponential overflows."""
    mask = jnp.asarray([[[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]])
    batch = {
        "prompts": jnp.zeros((1, 2), jnp.int32),
        "segment_ids": jnp.zeros((1, 2), jnp.int32),
        "tokens": jnp.ones((1, 2, 3), jnp.int32),
        "mask": mask,
        "advantages": jnp.asarray([[1.0, -1.0]]),
        "old": jnp.zeros((1, 2, 3)),
        "first": jnp.asarray([True]),
    }
    objective = PolicyGradient(SMALL, GRPO(group=2, kl=0.5))
    weights = weights_of(SMALL, 3)

    @jax.jit
    @jax.grad
    def gradient(weights, reference):
        return objective.loss(weights, batch | {"reference": reference})[0]

    want = gradient(weights, jnp.full(mask.shape, -2.0))
    for other in (500.0, jnp.nan):
        got = gradient(weights, jnp.where(mask > 0, -2.0, other))
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_nothing_flows_to_the_old_policy():
    g = jax.grad(lambda old: policy_loss(*f32(NEW), old, *f32(ADVANTAGES, MASK))[0])
    assert not np.any(g(*f32(OLD)))


def test_k3_estimates_the_divergence_and_is_never_negative():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    each = k3(*f32(np.log(p), np.log(q)))
    exact = np.sum(p * np.log(p / q))
    assert float(np.sum(p * np.asarray(each))) == pytest.approx(exact, rel=1e-5)
    near = jnp.linspace(-1e-3, 1e-3, 101)
    assert np.all(k3(jnp.zeros(101), near) >= 0)
    found = policy_loss(*f32(np.log(q)[None], np.log(p)[None], [1.0], np.ones((1, 3))))
    assert float(found[1]["kl_to_old"]) == pytest.approx(float(each.mean()), rel=1e-5)


def test_advantages():
    rewards = np.array([[1.0, 0, 0, 0], [3.0, 1.0, -2.0, 0.5]])
    centred = rewards - rewards.mean(1, keepdims=True)
    want = centred / rewards.std(1, keepdims=True)
    np.testing.assert_allclose(advantages(*f32(rewards)), want, rtol=1e-5)
    np.testing.assert_allclose(advantages(*f32(rewards), "none"), centred, atol=1e-6)
    moved = advantages(*f32(5 * rewards + 3))
    np.testing.assert_allclose(moved, want, rtol=1e-5)


@pytest.mark.parametrize("bad", (np.nan, -np.inf, np.inf))
def test_a_reward_that_is_not_finite_is_the_worst_of_all(bad):
    rewards = np.array([[1.0, bad, 3.0], [-2.0, 0.0, 5.0]])
    want = advantages(*f32([[1.0, -2.0, 3.0], [-2.0, 0.0, 5.0]]))
    np.testing.assert_array_equal(advantages(*f32(rewards)), want)
    nothing = advantages(jnp.full((2, 3), bad))
    np.testing.assert_array_equal(nothing, np.zeros((2, 3)))


@pytest.mark.parametrize("scale", ("deviation", "none"))
def test_groups_of_equal_rewards_have_no_advantage(scale):
    """Also where the mean of equal numbers is rounded to another, and beside 1e-30."""
    equal = [0.0, 1.0, 0.1, 1 / 3, 1e-30, -7e20]
    rewards = jnp.asarray([[r] * 7 for r in equal], jnp.float32)
    np.testing.assert_array_equal(advantages(rewards, scale), np.zeros((6, 7)))
    tiny = advantages(jnp.asarray([[1e-30, 0, 0]]), scale)
    assert np.all(np.isfinite(tiny))


@pytest.mark.parametrize(("actions", "group"), ((3, 2), (2, 4), (4, 3)))
def test_the_gradient_is_reinforce_with_the_groups_baseline(actions, group):
    """Over all groups that a softmax policy can draw, each by its probability.

    Without the deviation the mean is (G - 1) / G times the gradient of the expected
    reward, p_a (r_a - p . r); and for one group it is -1/G sum_i A_i grad log p(a_i).
    """
    rng = np.random.default_rng(actions)
    theta, reward = rng.normal(size=actions), 3 * rng.normal(size=actions)
    p = np.exp(theta) / np.exp(theta).sum()
    groups = np.array(list(itertools.product(range(actions), repeat=group)))

    def loss(theta, drawn):
        new = jax.nn.log_softmax(theta)[drawn][:, None]
        old = jax.lax.stop_gradient(new)
        gained = advantages(jnp.asarray(reward, jnp.float32)[drawn][None], "none")[0]
        return policy_loss(new, old, gained, jnp.ones((group, 1)))[0]

    slope = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))
    g = -np.asarray(slope(*f32(theta), jnp.asarray(groups)), np.float64)
    for drawn, of_group in zip(groups, g, strict=True):
        score = np.eye(actions)[drawn] - p
        gained = reward[drawn] - reward[drawn].mean()
        np.testing.assert_allclose(of_group, gained @ score / group, atol=1e-5)
    expected = np.prod(p[groups], axis=1) @ g
    true = p * (reward - p @ reward)
    assert np.linalg.norm(true) > 0.1
    np.testing.assert_allclose(expected, (group - 1) / group * true, atol=1e-5)


def bandit(questions=4):
    """After token q comes q + 1, of 8."""
    q = jnp.arange(questions, dtype=jnp.int32)[:, None]
    return rl.Questions(
        prompts=jnp.concatenate([jnp.full_like(q, 7), q], axis=1),
        segment_ids=jnp.zeros((questions, 2), jnp.int32),
        answers=q + 1,
        answer_mask=jnp.ones((questions, 1)),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    (
        GRPO(group=16),
        GRPO(
            *(8, 2, 6),
            clip_above=0.28,
            kl=0.01,
            scale="none",
            average="token",
            updates=3,
        ),
    ),
    ids=("paper", "variants"),
)
def test_a_small_model_learns_a_bandit(how):
    """From chance, 1 in 8, to three answers in four within 40 steps."""
    learner = how.build(CFG, optax.adam(1e-2))
    params = weights_of(CFG, 1)
    state, asked, rewards, clipped = learner.init(params), bandit(), [], []
    for step in range(40):
        state, params, figures = learner.step(
            state, params, asked, jax.random.fold_in(KEY, step)
        )
        rewards.append(float(figures["reward"]))
        clipped.append(float(figures["clipped"]))
        assert all(np.isfinite(value) for value in figures.values())
    assert rewards[0] < 0.3 and np.mean(rewards[-5:]) > 0.75
    assert (max(clipped) > 0) == (how.updates > 1)  # the first update is on policy
    greedy = jax.jit(functools.partial(rl.exact_match_reward, key=KEY, cfg=CFG))
    assert float(greedy(params, asked)) == 1


@pytest.mark.slow
def test_one_step_moves_along_the_gradient_of_its_own_draws():
    """Against the loss by loops, of the sampler's numbers, and its written slope.

    A bound of 1e-7 stops nothing: on policy every ratio is 1 to the last bit.
    """
    how = GRPO(4, 3, stop=2, temperature=1.3, clip=1e-7, scale="none", kl=0.5)
    params, asked = weights_of(SMALL, 1), bandit()
    reference = weights_of(SMALL, 2)
    reward = lambda tokens, mask, *_: jnp.sum(tokens * mask.astype(tokens.dtype), 1)  # noqa: E731
    learner = how.build(SMALL, optax.sgd(0.1), reward)
    state = learner.init(params).replace(reference=reference)
    _, moved, figures = jax.jit(learner.step)(state, params, asked, KEY)

    how_drawn = {"max_tokens": 3, "temperature": 1.3, "stop": 2, "samples": 4}
    sample = jax.jit(functools.partial(rl.sample, cfg=SMALL, **how_drawn))
    drawn = sample(params, asked.prompts, asked.segment_ids, KEY)
    tokens, old, mask = map(np.asarray, vars(drawn).values())
    assert 0 < (mask == 0).sum() and figures["length"] == mask.sum(1).mean()
    gained = (tokens * mask).sum(1).reshape(4, 4)
    assert float(figures["reward"]) == pytest.approx(gained.mean())
    gained = (gained - gained.mean(1, keepdims=True)).reshape(-1)
    assert figures["clipped"] == figures["kl_to_old"] == 0
    entropy = -(old * mask).sum() / mask.sum()
    assert float(figures["entropy"]) == pytest.approx(entropy, rel=1e-4)

    @jax.jit
    def log_p(p, pull):
        """Of whole sequences, one prompt a completion; and the gradient by a pull."""
        q = asked.repeat(4)
        of = lambda p: rl.log_probabilities(  # noqa: E731
            p, q.prompts, q.segment_ids, drawn.tokens, drawn.mask, SMALL, 1.3
        )
        found, gradient = jax.vjp(of, p)
        return found, gradient(pull)[0]

    away = np.asarray(log_p(reference, drawn.mask)[0], np.float64) - old
    cost = sum(
        sum(np.exp(d) - d - 1 for d, m in zip(*row, strict=True) if m) / row[1].sum()
        for row in zip(away, mask, strict=True)
    )
    plain = loop_loss(old, old, gained, mask, 0.2, 0.2, "sequence")[0]
    assert float(figures["loss"]) == pytest.approx(plain + 0.5 * cost / 16, rel=1e-3)

    # d loss / d log p = -A + beta (1 - pi_ref / pi), shared among a row's tokens.
    pull = jnp.asarray(
        mask * (-gained[:, None] + 0.5 * (1 - np.exp(away))), jnp.float32
    )
    pull = pull / mask.sum(1, keepdims=True) / 16
    g = log_p(params, pull)[1]
    for new, w, slope in zip(*map(jax.tree.leaves, (moved, params, g)), strict=True):
        error = np.linalg.norm((new - w) / -0.1 - slope)
        assert error <= 1e-3 * np.linalg.norm(slope) + 1e-5
    assert float(figures["gradient_norm"]) == pytest.approx(
        float(optax.tree.norm(g)), rel=1e-3
    )


def test_without_signal_nothing_moves():
    learner = GRPO(group=4).build(
        SMALL, optax.sgd(1.0), lambda tokens, *_: jnp.full(len(tokens), 0.1)
    )
    params = weights_of(SMALL, 1)
    _, moved, figures = learner.step(learner.init(params), params, bandit(), KEY)
    assert figures["no_signal"] == 1 and figures["gradient_norm"] == 0
    jax.tree.map(np.testing.assert_array_equal, moved, params)


@pytest.mark.parametrize(
    ("changed", "message"),
    (
        ({"group": 1}, "group=1, but must be at least 2"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": 0.0}, "temperature=0.0, but must be above 0"),
        ({"clip": 0.0}, "clip=0.0 is outside"),
        ({"clip_above": -0.1}, "clip_above=-0.1 must be above 0"),
        ({"kl": -1.0}, "kl=-1.0 is below 0"),
        ({"updates": 0}, "updates=0"),
        ({"scale": "mean"}, "scale='mean', but must be one of"),
        ({"average": "all"}, "average='all', but must be one of"),
    ),
)
def test_settings_that_cannot_be(changed, message):
    with pytest.raises(ValueError, match=message):
        GRPO(**changed)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: advantages(jnp.ones((3, 1))), r"shape \(3, 1\), .* at least 2"),
        (lambda: advantages(jnp.ones(4)), r"must be \[questions, group\]"),
        (lambda: advantages(jnp.ones((3, 2)), "mad"), "scale='mad'"),
        (lambda: policy_loss(*f32(NEW, OLD, [1.0], MASK)), r"advantages \(1,\) one"),
        (lambda: policy_loss(*f32(NEW, OLD[1:], ADVANTAGES, MASK)), r"old \(3, 3\)"),
        (lambda: token_average(*f32(NEW, MASK), "all"), "average='all'"),
    ),
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
