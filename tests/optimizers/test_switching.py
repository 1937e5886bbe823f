"""The switch leaves when the loss stops falling, once, and says when."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import params
from jaxlab.optimizers.mkor import preconditioned, scale_by_mkor
from jaxlab.optimizers.switching import Switch, left_at, while_it_pays
from jaxlab.params import ParamSpec, linear

GRADIENT = {"w": jnp.ones(3)}


def run(losses, switch):
    """What updates were multiplied by, and the state after all losses."""
    tx = while_it_pays(optax.scale(2.0), switch)
    update = jax.jit(lambda state, loss: tx.update(GRADIENT, state, value=loss))
    state, factors = tx.init(GRADIENT), []
    for loss in losses:
        updates, state = update(state, jnp.float32(loss))
        factors.append(float(updates["w"][0]))
    assert update._cache_size() == 1
    return factors, state


def oracle(losses, switch):
    """The first step without, in float64."""
    fast = slow = below = count = 0
    for step, loss in enumerate(losses):
        if not np.isfinite(loss):
            continue
        count += 1
        fast = switch.fast * fast + (1 - switch.fast) * loss
        slow = switch.slow * slow + (1 - switch.slow) * loss
        f, s = fast / (1 - switch.fast**count), slow / (1 - switch.slow**count)
        poor = (s - f) / abs(s) < switch.least and count > switch.warmup
        below = below + 1 if poor else 0
        if below == switch.patience:
            return step + 1
    return None


LOSSES = {
    "falls, then does not": [*np.linspace(5, 1, 60), *np.full(190, 1.0)],
    "falls for ever": list(np.geomspace(5, 0.1, 150)),
    "rises": list(np.linspace(1, 5, 150)),
    "noise on a plateau": list(1 + 0.01 * np.random.default_rng(0).normal(size=150)),
    "below 0": [*np.linspace(-1, -5, 60), *np.full(190, -5.0)],
    "not finite at times": [
        np.nan if i % 7 == 0 else max(5 - 0.1 * i, 1) for i in range(150)
    ],
}


@pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES)
def test_it_leaves_at_the_step_of_the_rule(losses):
    switch = Switch(fast=0.8, slow=0.95, patience=5, warmup=10)
    factors, state = run(losses, switch)
    at = oracle(losses, switch)
    assert left_at(state) == at
    at = len(losses) if at is None else at
    assert factors == [2.0] * at + [1.0] * (len(losses) - at)


def test_the_losses_that_are_meant_to_leave_do():
    switch = Switch(fast=0.8, slow=0.95, patience=5, warmup=10)
    found = {name: oracle(losses, switch) for name, losses in LOSSES.items()}
    assert found["falls for ever"] is None
    assert 60 < found["falls, then does not"] < 240
    assert found["rises"] == 15


def test_what_is_left_stays_as_it_was():
    switch = Switch(fast=0.5, slow=0.9, patience=1, warmup=0)
    tx = while_it_pays(optax.trace(0.9), switch)
    state = tx.init(GRADIENT)
    for loss in (1.0, 2.0, 3.0, 0.1, 0.1):
        updates, state = tx.update(GRADIENT, state, value=jnp.float32(loss))
    assert left_at(state) == 1
    np.testing.assert_array_equal(state.inner.trace["w"], 1.0)
    np.testing.assert_array_equal(updates["w"], 1.0)


def test_mkor_is_left_once_least_squares_has_only_noise_to_fit():
    """Ill-conditioned inputs far from 0: MKOR pays at first, and then no more."""
    rng = np.random.default_rng(0)
    specs = {"w": ParamSpec((16, 8), (None, None))}
    where = preconditioned(specs)
    truth, mean = rng.normal(size=(16, 8)), rng.normal(size=(1, 16))
    x = (rng.normal(size=(600, 64, 16)) + mean) * np.geomspace(1, 0.1, 16)
    y = x @ truth + 0.3 * rng.normal(size=(600, 64, 8))
    batches = tuple(jnp.asarray(part, jnp.float32) for part in (x, y))

    def loss(weights, batch):
        wrong = linear(batch[0], weights["w"]) - batch[1]
        return jnp.mean(jnp.sum(wrong**2, axis=-1)) / 2

    def run(*parts):
        tx = optax.chain(*parts, optax.sgd(0.03, momentum=0.9))

        def step(carry, batch):
            weights, state = carry
            value, g = jax.value_and_grad(loss)(params.tap(weights, where), batch)
            g, stats = params.untap(g)
            updates, state = tx.update(g, state, weights, value=value, stats=stats)
            return (optax.apply_updates(weights, updates), state), value

        weights = params.init(specs, jax.random.key(0))
        start = weights, tx.init(weights)
        (weights, state), losses = jax.lax.scan(step, start, batches)
        return np.asarray(losses), state

    first, _ = run(optax.with_extra_args_support(optax.identity()))
    second, _ = run(scale_by_mkor(specs))
    switch = Switch(fast=0.9, slow=0.98, least=1e-2)
    hybrid, state = run(while_it_pays(scale_by_mkor(specs), switch))
    at = left_at(state)
    assert at is not None and 100 < at < 600
    # MKOR paid before the step of the switch, and it did not afterwards.
    assert second[80:120].mean() < 0.9 * first[80:120].mean()
    np.testing.assert_allclose(hybrid[:at], second[:at], rtol=1e-4)
    assert hybrid[at:].mean() < 1.02 * second[at:].mean()
    assert abs(second[at:].mean() / 0.36 - 1) < 0.05  # 8 outputs of variance 0.09


def test_errors():
    tx = while_it_pays(optax.identity())
    with pytest.raises(ValueError, match="depends on the loss: call update"):
        tx.update(GRADIENT, tx.init(GRADIENT))
    with pytest.raises(ValueError, match="holds 0 switches"):
        left_at(optax.identity().init(GRADIENT))
    with pytest.raises(ValueError, match="fast below"):
        Switch(fast=0.99, slow=0.9)
    with pytest.raises(ValueError, match="patience=0 must be a whole number of steps"):
        Switch(patience=0)
