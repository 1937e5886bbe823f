"""The language model: stepping, packing, hybrids, remat, precision, sharding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import models, params
from jaxlab.mixers import attention, mamba2, mom
from jaxlab.models import LMConfig

B, T = 2, 11
MEMORIES = mom.Config(16, n_heads=2, rule="linear_attention")
RECURRENT = mamba2.Config(16, head_size=8, n_states=8)
HYBRID = LMConfig(
    vocab_size=24,
    width=16,
    n_layers=4,
    pattern=(RECURRENT, attention.Config(16, n_heads=2)),
    tie_embeddings=False,
)
PLAIN = LMConfig(vocab_size=24, width=16, n_layers=2, pattern=(RECURRENT,))


run = jax.jit(models.forward, static_argnames="cfg")
initial = jax.jit(models.init, static_argnums=0)


@functools.cache
def setup(cfg):
    tokens = np.random.default_rng(3).integers(0, cfg.vocab_size, (B, T), np.int32)
    return initial(cfg, jax.random.key(4)), tokens


def same_to_rounding(a, b):
    """Other orders of summation, through four blocks and back: rounding in norm."""
    assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


def loss(p, tokens, cfg):
    logits, _ = models.forward(p, tokens, cfg)
    return -jnp.mean(jax.nn.log_softmax(logits)[:, :-1, 0])


@pytest.mark.parametrize("cfg", [HYBRID, PLAIN], ids=["hybrid", "plain"])
def test_forward_equals_steps_from_a_prefix(cfg):
    p, tokens = setup(cfg)
    logits, none = run(p, tokens, cfg=cfg)
    assert none is None and logits.shape == (B, T, 24)
    state = models.init_state(cfg, B, T)
    prefix, state = run(p, tokens[:, :5], cfg=cfg, state=state)
    logits = np.asarray(logits)
    np.testing.assert_allclose(prefix, logits[:, :5], rtol=1e-4, atol=1e-5)
    one = jax.jit(functools.partial(models.step, cfg=cfg))
    for t in range(5, T):
        y, state = one(p, tokens[:, t], state=state)
        np.testing.assert_allclose(y, logits[:, t], rtol=1e-4, atol=1e-5)


def test_packing_equals_separate_documents():
    p, tokens = setup(HYBRID)
    ids = np.tile(np.int32([0] * 4 + [1] * 7), (B, 1))
    packed, _ = run(p, tokens, cfg=HYBRID, segment_ids=ids)
    apart = [run(p, tokens[:, s], cfg=HYBRID)[0] for s in np.s_[:4, 4:]]
    np.testing.assert_allclose(packed, np.concatenate(apart, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remat", ["dots", "block"])
def test_remat_changes_memory_not_values(remat, optimized):
    p, tokens = setup(PLAIN)
    cfg = dataclasses.replace(PLAIN, remat=remat)
    # The bound is of roundings in a program that a user gets, optimised by LLVM too.
    grads = jax.jit(jax.grad(loss), static_argnums=2, compiler_options=optimized)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        grads(p, tokens, cfg),
        grads(p, tokens, PLAIN),
    )


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    p, tokens = setup(HYBRID)
    cfg = dataclasses.replace(HYBRID, compute_dtype="bfloat16")
    logits, _ = run(p, tokens, cfg=cfg)
    assert logits.dtype == jnp.float32
    reference, _ = run(p, tokens, cfg=HYBRID)
    reference = np.asarray(reference)
    error = np.linalg.norm(logits - reference) / np.linalg.norm(reference)
    assert 0 < error < 0.1
    grads = jax.eval_shape(jax.grad(functools.partial(loss, cfg=cfg)), p, tokens)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


WITH_MEMORIES = dataclasses.replace(
    PLAIN, n_layers=4, pattern=(MEMORIES, RECURRENT), remat="none"
)
PADDED = np.tile(np.int32([-1] * 2 + [0] * 9), (B, 1))


@functools.cache
def recorded():
    """The logits, and what each mixer says of the input that it was given."""
    p, tokens = setup(WITH_MEMORIES)
    seen, real_loss = [], mom.auxiliary_loss

    def record(*arguments, **keywords):
        value = real_loss(*arguments, **keywords)
        jax.debug.callback(lambda x: seen.append(float(x)), value, ordered=True)
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mom, "auxiliary_loss", record)
        recording = functools.partial(
            models.forward_with_auxiliary_loss, cfg=WITH_MEMORIES
        )
        jax.block_until_ready(jax.jit(recording)(p, tokens, segment_ids=PADDED))
        jax.effects_barrier()
    logits, _ = run(p, tokens, cfg=WITH_MEMORIES, segment_ids=PADDED)
    return logits, seen


@pytest.mark.parametrize("remat", ["none", "block"])
def test_auxiliary_loss_is_the_mean_over_the_layers_that_have_one(remat):
    cfg = dataclasses.replace(WITH_MEMORIES, remat=remat)
    p, tokens = setup(WITH_MEMORIES)
    expected, seen = recorded()
    both = jax.jit(functools.partial(models.forward_with_auxiliary_loss, cfg=cfg))
    logits, loss = both(p, tokens, segment_ids=PADDED)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 2 and seen[0] != seen[1]
    np.testing.assert_allclose(loss, np.mean(seen), rtol=1e-5)


def test_auxiliary_loss_is_zero_without_such_a_mixer():
    p, tokens = setup(PLAIN)
    both = jax.jit(functools.partial(models.forward_with_auxiliary_loss, cfg=PLAIN))
    logits, loss = both(p, tokens)
    assert loss == 0
    np.testing.assert_array_equal(logits, run(p, tokens, cfg=PLAIN)[0])


def test_compile_time_does_not_grow_with_depth():
    def size(n_layers):
        cfg = dataclasses.replace(PLAIN, n_layers=n_layers)
        run = functools.partial(models.forward, cfg=cfg)
        shapes = params.abstract(models.spec(cfg))
        return len(jax.make_jaxpr(run)(shapes, jnp.zeros((B, T), jnp.int32)).eqns)

    assert size(2) == size(8)


def test_sharded_equals_single_device():
    p, tokens = setup(HYBRID)
    tokens = np.tile(tokens, (4, 1))
    mesh = params.make_mesh(params.MeshConfig(data=2, fsdp=2, tensor=2))
    grad = jax.jit(jax.grad(loss), static_argnums=2)
    with jax.set_mesh(mesh):
        shardings = params.shardings(models.spec(HYBRID), mesh)
        rows = jax.NamedSharding(mesh, params.partition_spec(("batch", None)))
        split = grad(jax.device_put(p, shardings), jax.device_put(tokens, rows), HYBRID)
    whole = grad(p, tokens, HYBRID)
    jax.tree.map(same_to_rounding, jax.device_get(split), jax.device_get(whole))


def test_mixers_take_the_models_width():
    cfg = dataclasses.replace(PLAIN, width=32)
    assert cfg.pattern[0].width == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 3}, "n_layers=3 is not a multiple of the pattern's 2"),
        ({"pattern": ()}, "pattern is empty"),
        ({"compute_dtype": "float16"}, "compute_dtype='float16'"),
        ({"remat": "all"}, "remat='all' is not one of"),
    ],
)
def test_errors_name_the_value_and_the_rule(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HYBRID, **changes)
