"""Likelihoods by blocks of positions: the numbers and gradients of whole logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import models, params
from jaxlab.mixers import gla
from jaxlab.models import LMConfig

B, T, WIDTH, VOCABULARY = 4, 13, 16, 24
TIED = LMConfig(VOCABULARY, WIDTH, 1, (gla.Config(WIDTH, n_heads=2, gate_rank=2),))
UNTIED = LMConfig(
    VOCABULARY, WIDTH, 1, (gla.Config(WIDTH, n_heads=2),), tie_embeddings=False
)
KEY = jax.random.key(3)
X = jax.random.normal(KEY, (B, T, WIDTH))
TARGETS = jax.random.randint(KEY, (B, T), 0, VOCABULARY)
WEIGHTS = jax.random.normal(KEY, (B, T))


def close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


def whole(p, x, cfg, temperature):
    """With logits that exist at once, by hand."""
    log_p = jax.nn.log_softmax(models.logits(p, x, cfg) / temperature)
    nats = -jnp.take_along_axis(log_p, TARGETS[..., None], -1)[..., 0]
    return jnp.sum(nats * WEIGHTS), nats


def by_blocks(p, x, cfg, temperature, block):
    nats = models.next_token_nats(
        p, x, TARGETS, cfg, temperature=temperature, block=block
    )
    return jnp.sum(nats * WEIGHTS), nats


def value_and_grad(function, p, *arguments):
    f = functools.partial(function, cfg=arguments[0], temperature=0.7)
    f = functools.partial(f, block=arguments[1]) if arguments[1:] else f
    return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(p, X)


@pytest.mark.parametrize("cfg", (TIED, UNTIED), ids=("tied", "untied"))
def test_blocks_equal_the_whole(cfg):
    p = models.init(cfg, KEY)
    expected = value_and_grad(whole, p, cfg)
    for block in (4, T):  # four blocks, of which the last is not full; one
        close(value_and_grad(by_blocks, p, cfg, block), expected)


def test_blocks_of_one_position_for_any_function():
    p = models.init(TIED, KEY)

    def function(logits, targets):
        return {"likeliest": jnp.argmax(logits, -1), "logits": logits, "t": targets}

    blocks = models.map_logits(function, p, X, TIED, TARGETS, block=1)
    logits = models.logits(p, X, TIED)
    close(blocks["logits"], logits)
    np.testing.assert_array_equal(blocks["likeliest"], jnp.argmax(logits, -1))
    np.testing.assert_array_equal(blocks["t"], TARGETS)


def test_sharded_equals_single_device():
    p = models.init(UNTIED, KEY)
    expected = value_and_grad(by_blocks, p, UNTIED, 4)
    mesh = params.make_mesh(params.MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        shardings = params.shardings(models.spec(UNTIED), mesh)
        split = value_and_grad(by_blocks, jax.device_put(p, shardings), UNTIED, 4)
    close(split, expected)


def test_memory_is_that_of_a_block():
    """The vocabulary is large beside all else, and there are 16 blocks."""
    cfg = LMConfig(4096, WIDTH, 1, (gla.Config(WIDTH, n_heads=2),))
    p = params.abstract(models.spec(cfg))
    x = jax.ShapeDtypeStruct((B, 256, WIDTH), jnp.float32)
    targets = jax.ShapeDtypeStruct((B, 256), jnp.int32)

    def temporary(block):
        def loss(p, x, targets):
            return models.next_token_nats(p, x, targets, cfg, block=block).sum()

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        memory = gradient.lower(p, x, targets).compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert temporary(16) < temporary(256) / 4


def test_a_block_is_a_position_or_more():
    with pytest.raises(ValueError, match="block=0 must be at least 1"):
        models.next_token_nats({}, X, TARGETS, TIED, block=0)
