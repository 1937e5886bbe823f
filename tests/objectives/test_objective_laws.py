"""The laws that every objective obeys. A new objective is one more row of CASES."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import objectives, params
from jaxlab.mixers import attention, mom
from jaxlab.models import LMConfig
from jaxlab.objectives import NextToken, Ratio, gradient_step, heldout_scores
from jaxlab.params import ParamSpec, linear
from jaxlab.rl import GRPO
from jaxlab.rl.grpo import PolicyGradient

ROWS, T, VOCABULARY = 8, 6, 8
KEY = jax.random.key(5)


def model(**changes) -> LMConfig:
    mixer = attention.Config(8, n_heads=2)
    settings = dict(vocab_size=VOCABULARY, width=8, n_layers=1, pattern=(mixer,))
    return LMConfig(**(settings | changes))


@dataclasses.dataclass(frozen=True)
class NoisyRegression:
    """Squared error of inputs with noise: an objective of somebody's own."""

    noise: float = 0.1

    def spec(self):
        return {"w": ParamSpec((4, 2), ("width", None))}

    def loss(self, params, batch, key):
        # A draw a row, so that it does not matter which part a row is in.
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(batch["row"])
        noise = jax.vmap(lambda k: jax.random.normal(k, (4,)))(keys)
        error = linear(batch["x"] + self.noise * noise, params["w"]) - batch["y"]
        squares, weights = jnp.sum(error**2, axis=-1), batch["weights"]
        worst = Ratio(jnp.sum(jnp.abs(error[:, 0]) * weights), 2 * jnp.sum(weights))
        return jnp.sum(squares * weights), jnp.sum(weights), {"half": worst}


def tokens(seed=0, text=True):
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(VOCABULARY, size=(ROWS, T)).astype(np.int32)  # noqa: E731
    batch = {
        "inputs": draw(),
        "targets": draw(),
        "segment_ids": np.zeros((ROWS, T), np.int32),
        "weights": rng.integers(0, 2, (ROWS, T)).astype(np.float32),
    }
    if text:
        batch["bytes"] = rng.integers(1, 4, (ROWS, T)).astype(np.float32)
    return batch


def pairs():
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((ROWS, 4), np.float32),
        "y": rng.standard_normal((ROWS, 2), np.float32),
        "row": np.arange(ROWS, dtype=np.int32),
        "weights": np.arange(1, ROWS + 1, dtype=np.float32),
    }


def answers(reference: bool):
    rng = np.random.default_rng(0)
    G, N = 2, 3
    log_p = lambda: -rng.random((ROWS, G, N), np.float32)  # noqa: E731
    batch = {
        "prompts": rng.integers(VOCABULARY, size=(ROWS, T)).astype(np.int32),
        "segment_ids": np.zeros((ROWS, T), np.int32),
        "tokens": rng.integers(VOCABULARY, size=(ROWS, G, N)).astype(np.int32),
        "mask": np.tile(np.float32([[1, 1, 1], [1, 1, 0]]), (ROWS, 1, 1)),
        "advantages": rng.standard_normal((ROWS, G), np.float32),
        "old": log_p() - 2,
        "first": np.zeros(ROWS, bool),
    }
    return batch | ({"reference": log_p() - 2} if reference else {})


# The objective, a batch, and the entry that weighs its rows.
CASES: dict[str, tuple[Any, Any, str]] = {
    "next token": (NextToken(model()), tokens(), "weights"),
    "somebody's own": (NoisyRegression(), pairs(), "weights"),
    "policy gradient": (
        PolicyGradient(model(), GRPO(group=2, average="token", kl=0.1)),
        answers(reference=True),
        "mask",
    ),
}


def initial(objective):
    init = jax.jit(functools.partial(params.init, objective.spec()))
    return init(jax.random.key(1))


class Law:
    """One objective with parameters, and what its step returns."""

    def __init__(self, objective, batch, weights):
        self.objective, self.batch, self.weights = objective, batch, weights
        self.params = initial(objective)
        self.optimizer = optax.sgd(1.0)
        step = functools.partial(gradient_step, objective, self.optimizer)
        self._step = jax.jit(step, static_argnames="accumulate")

    def step(self, batch, accumulate=1, key=KEY):
        opt_state = self.optimizer.init(self.params)
        new, _, metrics = self._step(
            self.params, opt_state, batch, key, accumulate=accumulate
        )
        return new, metrics


@functools.cache
def law_of(name):
    return Law(*CASES[name])


@pytest.fixture(params=CASES, scope="module")
def law(request):
    return law_of(request.param)


@pytest.fixture(scope="module")
def whole(law):
    return law.step(law.batch)


def assert_close(got, want, rtol=2e-4, atol=2e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want
    )


def test_the_step_is_that_of_the_mean_loss(law, whole):
    """By finite differences, along the step itself."""
    new, metrics = whole
    gradient = jax.tree.map(lambda a, b: a - b, law.params, new)

    @jax.jit
    def loss(t):
        moved = jax.tree.map(lambda p, g: p - t * g, law.params, gradient)
        total, weight, _ = law.objective.loss(moved, law.batch, KEY)
        return total / weight

    slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert float(-slope) == pytest.approx(
        float(metrics["gradient_norm"]) ** 2, rel=2e-2
    )
    assert float(metrics["gradient_norm"]) > 1e-3


def test_accumulated_parts_equal_the_whole(law, whole):
    if isinstance(law.objective, NoisyRegression):
        # Parts draw by keys of their own.
        law = Law(NoisyRegression(noise=0.0), law.batch, law.weights)
        whole = law.step(law.batch)
    new, metrics = law.step(law.batch, accumulate=4)
    # The parts scatter around the gradient, and only a step in parts knows it.
    part_norm = metrics.pop("part_gradient_norm")
    assert part_norm >= metrics["gradient_norm"] * (1 - 1e-5)
    assert_close((new, metrics), whole)


def test_rows_of_weight_zero_are_no_rows(law, whole):
    """The means are those of the other half, taken twice."""
    batch = dict(law.batch)
    batch[law.weights] = batch[law.weights].copy()
    batch[law.weights][ROWS // 2 :] = 0
    twice = jax.tree.map(lambda a: np.concatenate([a[: ROWS // 2]] * 2), batch)
    assert_close(law.step(batch), law.step(twice))
    changed = jax.tree.map(lambda a: a.copy(), batch)
    for name in ("inputs", "targets", "x", "y", "tokens", "advantages"):
        if name in changed:
            changed[name][ROWS // 2 :] = 1
    assert_close(law.step(changed), law.step(batch), rtol=1e-5)


def test_a_mesh_changes_nothing(law, whole):
    mesh = params.make_mesh(params.MeshConfig(data=4, tensor=2))
    with jax.set_mesh(mesh):
        got = law.step(params.place_rows(law.batch, mesh))
    assert_close(got, whole)


def test_one_key_gives_one_loss(law, whole):
    jax.tree.map(np.testing.assert_array_equal, law.step(law.batch), whole)


def test_heldout_scores_are_the_means_of_all_batches(law, whole):
    mesh = params.make_mesh(params.MeshConfig())
    with jax.set_mesh(mesh):
        scores = heldout_scores(law.objective, law.params, [law.batch] * 2, mesh)
    if not isinstance(law.objective, NoisyRegression):  # whose key is another
        assert scores["loss"] == pytest.approx(float(whole[1]["loss"]), rel=1e-4)
    else:
        assert set(scores) == {"loss", "half"}


def test_other_keys_give_other_draws():
    law = law_of("somebody's own")
    losses = [law.step(law.batch, key=jax.random.key(n))[1]["loss"] for n in range(2)]
    assert losses[0] != losses[1]


# Figures ------------------------------------------------------------------------------


def test_figures_of_text():
    law = law_of("next token")
    batch, (_, metrics) = law.batch, law.step(law.batch)
    weight, size = batch["weights"].sum(), (batch["bytes"] * batch["weights"]).sum()
    nats = float(metrics["loss"]) * weight
    assert float(metrics["bits_per_byte"]) == pytest.approx(nats / np.log(2) / size)
    assert "auxiliary_loss" not in metrics


def test_auxiliary_losses_are_learned_and_shown_apart():
    mixer = mom.Config(8, n_heads=2, balance_weight=1.0)
    objective = NextToken(model(pattern=(mixer,)))
    total, weight, figures = jax.jit(objective.loss)(
        initial(objective), tokens(text=False)
    )
    assert figures["auxiliary_loss"] > 0
    assert float(total) == pytest.approx(
        float(figures["loss"] + figures["auxiliary_loss"]), rel=1e-6
    )
    assert set(figures) == {"loss", "auxiliary_loss"} and weight > 0


# What cannot be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "message"),
    (
        (lambda x: x.sum(), "returned .*but must return .total, weight, figures"),
        (lambda x: (x.sum(), x.sum()), "returned 2 values, but must return"),
        (lambda x: (x, x.sum(), {}), r"an array of shape \(8,\) for total"),
        (lambda x: (x.sum(), None, {}), "None for weight, which must be a scalar"),
        (lambda x: (x.sum(), 8, {}), "8 for weight, which must be a scalar array"),
        (lambda x: (x.sum(), x.sum(), [1]), "figures of type list"),
        (lambda x: (x.sum(), x.sum(), {"a": x}), r"an array of shape \(8,\) for a"),
    ),
)
def test_what_is_said_of_an_objective_that_returns_something_else(returned, message):
    class Wrong:
        def loss(self, params, batch, key):
            return returned(params * batch)

    optimizer = optax.sgd(1.0)
    weights = jnp.ones(8)
    arguments = (weights, optimizer.init(weights), jnp.ones(8), KEY)
    with pytest.raises(TypeError, match=f"Wrong.loss {message}|Wrong.loss .*{message}"):
        gradient_step(Wrong(), optimizer, *arguments)


def test_nothing_to_score_is_said():
    mesh = params.make_mesh(params.MeshConfig())
    law = law_of("somebody's own")
    with pytest.raises(ValueError, match="no held-out batches"):
        heldout_scores(law.objective, law.params, [], mesh)
    empty = law.batch | {"weights": np.zeros(ROWS, np.float32)}
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="have weight 0"):
        heldout_scores(law.objective, law.params, [empty], mesh)


def test_the_contract_is_a_protocol():
    objective: objectives.Objective = NoisyRegression()
    assert objective.spec()["w"].shape == (4, 2)
