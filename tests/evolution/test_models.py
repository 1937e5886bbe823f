"""EGGROLL over the models of jaxlab: members of every mixer, and tied tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import models, params
from jaxlab.evolution import EGGROLL, Raw, State, es_value_and_grad
from jaxlab.mixers import MIXERS
from jaxlab.models import LMConfig
from jaxlab.params import LowRank, value
from tests.evolution import asked

WIDTH, MEMBERS = 16, 4
HEADS = {"mamba2": {"head_size": 8}}  # whose default does not fit the width
CONFIGS = {
    name: mixer.Config(WIDTH, **HEADS.get(name, {})) for name, mixer in MIXERS.items()
}
# Each of them is divided and drawn like another parameter, which moves.
LIKE_OTHERS = ("blocks/0/mixer_norm", "blocks/0/mixer/w_v", "blocks/0/mlp/w_up")
initial = jax.jit(models.init, static_argnums=0)
TOKENS = jax.random.randint(jax.random.key(3), (2, 9), 0, 32)


def model(mixer, **changed):
    return LMConfig(
        **{"vocab_size": 32, "width": WIDTH, "n_layers": 2, "pattern": (mixer,)},
        **changed,
    )


def log_likelihood(weights, key, cfg):
    logits, _ = models.forward(weights, TOKENS, cfg)
    nats = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], TOKENS[:, 1:]
    )
    return -nats.mean()


def quantized(weights):
    """The matrices of the blocks in int8."""
    quantize = jax.jit(params.quantize)
    of = lambda w: quantize(w) if w.ndim == 3 else w  # noqa: E731
    return {**weights, "blocks": jax.tree.map(of, weights["blocks"])}


@pytest.mark.parametrize("name", CONFIGS)
def test_members_of_every_mixer_compute_what_their_matrices_say(name):
    """Members by shared bases and thin products, against one dense model at a time."""
    cfg = model(CONFIGS[name])
    specs = models.spec(cfg)
    strategy = EGGROLL(MEMBERS, sigma=0.05).build(specs, optax.sgd(0.1))
    stacked, axes = asked.members(strategy, specs)
    fitness = functools.partial(log_likelihood, key=None, cfg=cfg)
    dense = lambda member: jax.tree.map(  # noqa: E731
        value, member, is_leaf=lambda w: isinstance(w, LowRank)
    )

    @jax.jit
    def both(stacked):
        whole = jax.vmap(dense, in_axes=(axes,))(stacked)
        one_by_one = jax.lax.map(fitness, whole)
        return jax.vmap(fitness, in_axes=(axes,))(stacked), one_by_one

    got, want = both(stacked)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert float(np.ptp(got)) > 1e-4


def generation_of(base, update="replicated"):
    """A compiled generation of a small model, and what it takes; and the specs."""
    cfg = model(MIXERS["attention"].Config(WIDTH))
    specs = models.spec(cfg)
    weights = base(initial(cfg, jax.random.key(0)))
    es = EGGROLL(16, sigma=0.05, update=update, frozen=LIKE_OTHERS)
    strategy = es.build(specs, optax.sgd(0.1))
    fitness = functools.partial(log_likelihood, cfg=cfg)
    step = jax.jit(lambda state, weights: strategy.step(state, weights, fitness))
    return step, strategy.init(weights, jax.random.key(1)), weights, specs


@functools.cache
def generation_of_one_device(base):
    step, state, weights, _ = generation_of(base)
    return jax.device_get(step(state, weights)[1:])


@pytest.mark.slow
@pytest.mark.parametrize("base", (lambda w: w, quantized), ids=("dense", "quantized"))
@pytest.mark.parametrize("update", ("replicated", "sharded"))
def test_a_generation_on_a_mesh_with_a_tensor_axis(base, update):
    """The population over one axis, each member's weights over the other."""
    want, found = generation_of_one_device(base)
    step, state, weights, specs = generation_of(base, update)
    mesh = params.make_mesh(params.MeshConfig(data=4, tensor=2))
    with jax.set_mesh(mesh):
        if base is not quantized:
            weights = jax.device_put(weights, params.shardings(specs, mesh))
        _, got, of_mesh = step(state, weights)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, jax.device_get(got), want)
    close(of_mesh["fitness"], found["fitness"])


@pytest.mark.slow
@pytest.mark.parametrize("tied", (True, False))
def test_the_estimate_is_the_gradient_on_average(tied):
    """Of a whole language model; a tied table has one noise in both its uses."""
    cfg = model(MIXERS["attention"].Config(WIDTH), tie_embeddings=tied)
    specs = models.spec(cfg)
    weights = initial(cfg, jax.random.key(0))
    fitness = functools.partial(log_likelihood, cfg=cfg)
    es = EGGROLL(4096, sigma=1e-2, shape=Raw(), members_at_once=512)
    state = State(jax.random.key(2), jnp.int32(0))
    _, g, _ = jax.jit(es_value_and_grad(fitness, es, specs))(weights, state)
    true = jax.jit(jax.grad(lambda w: fitness(w, None)))(weights)

    def flat(tree):
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])

    def slope(estimate, exact):
        """Of the estimate over the exact gradient: 1, its spread about P^-1/2."""
        return float(estimate @ exact / (exact @ exact))

    assert slope(flat(g), flat(true)) == pytest.approx(1, abs=0.1)
    table = flat(true["embedding"])
    own = float(np.linalg.norm(table) / np.linalg.norm(flat(true)))
    assert slope(flat(g["embedding"]), table) == pytest.approx(1, abs=0.1 / own)
