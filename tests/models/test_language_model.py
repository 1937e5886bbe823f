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


@functools.cache
def setup(cfg):
    tokens = jax.random.randint(jax.random.key(3), (B, T), 0, cfg.vocab_size)
    return models.init(cfg, jax.random.key(4)), tokens


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
    np.testing.assert_allclose(prefix, logits[:, :5], rtol=1e-4, atol=1e-5)
    one = jax.jit(functools.partial(models.step, cfg=cfg))
    for t in range(5, T):
        y, state = one(p, tokens[:, t], state=state)
        np.testing.assert_allclose(y, logits[:, t], rtol=1e-4, atol=1e-5)


def test_packing_equals_separate_documents():
    p, tokens = setup(HYBRID)
    ids = jnp.broadcast_to(jnp.array([0] * 4 + [1] * 7)[None], (B, T))
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
    error = np.linalg.norm(logits - reference) / np.linalg.norm(reference)
    assert 0 < error < 0.1
    grads = jax.eval_shape(jax.grad(functools.partial(loss, cfg=cfg)), p, tokens)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("remat", ["none", "block"])
def test_auxiliary_loss_is_the_mean_over_the_layers_that_have_one(remat):
    """The same logits, and what each mixer says of the input that it was given."""
    pattern = (MEMORIES, RECURRENT)
    cfg = dataclasses.replace(PLAIN, n_layers=4, pattern=pattern, remat=remat)
    p, tokens = setup(cfg)
    ids = jnp.broadcast_to(jnp.array([-1] * 2 + [0] * 9)[None], (B, T))
    both = jax.jit(functools.partial(models.forward_with_auxiliary_loss, cfg=cfg))
    logits, loss = both(p, tokens, segment_ids=ids)
    expected, _ = run(p, tokens, cfg=cfg, segment_ids=ids)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)

    seen, real_loss = [], mom.auxiliary_loss

    def record(*arguments, **keywords):
        value = real_loss(*arguments, **keywords)
        jax.debug.callback(lambda x: seen.append(float(x)), value, ordered=True)
        return value

    kept = dataclasses.replace(cfg, remat="none")  # remat would record it twice
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mom, "auxiliary_loss", record)
        recording = functools.partial(models.forward_with_auxiliary_loss, cfg=kept)
        jax.block_until_ready(jax.jit(recording)(p, tokens, segment_ids=ids))
        jax.effects_barrier()
    assert len(seen) == 2 and seen[0] != seen[1]
    np.testing.assert_allclose(loss, np.mean(seen), rtol=1e-5)


def test_auxiliary_loss_is_zero_without_such_a_mixer():
    p, tokens = setup(PLAIN)
    logits, loss = models.forward_with_auxiliary_loss(p, tokens, PLAIN)
    assert loss == 0
    np.testing.assert_array_equal(logits, models.forward(p, tokens, PLAIN)[0])


def test_compile_time_does_not_grow_with_depth():
    def size(n_layers):
        cfg = dataclasses.replace(PLAIN, n_layers=n_layers)
        run = functools.partial(models.forward, cfg=cfg)
        shapes = params.abstract(models.spec(cfg))
        return len(jax.make_jaxpr(run)(shapes, jnp.zeros((B, T), jnp.int32)).eqns)

    assert size(2) == size(8)


def test_sharded_equals_single_device():
    p, tokens = setup(HYBRID)
    tokens = jnp.tile(tokens, (4, 1))
    mesh = params.make_mesh(params.MeshConfig(data=2, fsdp=2, tensor=2))
    grad = jax.jit(jax.grad(loss), static_argnums=2)
    with jax.set_mesh(mesh):
        shardings = params.shardings(models.spec(HYBRID), mesh)
        rows = jax.NamedSharding(mesh, params.partition_spec(("batch", None)))
        split = grad(jax.device_put(p, shardings), jax.device_put(tokens, rows), HYBRID)
    jax.tree.map(same_to_rounding, split, grad(p, tokens, HYBRID))


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
