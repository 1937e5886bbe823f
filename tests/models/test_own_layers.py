"""Layers of the user's own files in a model: the class of a config leads to them."""

import dataclasses
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import models
from jaxlab.feedforward import swiglu
from jaxlab.mixers import MIXERS, mixer_of
from jaxlab.models import LMConfig
from tests.models import own_feedforward, own_mixer

CFG = LMConfig(
    vocab_size=12,
    width=8,
    n_layers=4,
    pattern=(own_mixer.Config(8), own_mixer.Config(8, gamma=0.9)),
    feedforward=own_feedforward.Config(8),
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 6), 0, 12)


def test_every_file_of_a_method_is_a_mixer():
    assert {"attention", "delta_product", "gla", "mamba"} <= set(MIXERS)
    assert all(mixer_of(m.Config(64)) is m for m in MIXERS.values())


def test_a_mixer_of_ones_own_works_in_a_model():
    p = models.init(CFG, jax.random.key(1))
    logits, _ = models.forward(p, TOKENS, CFG)
    state = models.init_state(CFG, 2, 6)
    one = jax.jit(functools.partial(models.step, cfg=CFG))
    for t in range(6):
        y, state = one(p, TOKENS[:, t], state=state)
        np.testing.assert_allclose(y, logits[:, t], rtol=1e-4, atol=1e-5)


def test_a_feed_forward_layer_may_have_a_loss(monkeypatch):
    """Its mean over the layers, besides the mean of the mixers' losses."""
    p = models.init(CFG, jax.random.key(1))
    ids = jnp.asarray([[-1, 0, 0, 0, 0, 0]] * 2)
    assert models.has_auxiliary_loss(CFG) and not models.has_auxiliary_loss(LMConfig())
    seen = []

    def recorded(kind, loss):
        def record(*arguments, **keywords):
            seen.append((kind, float(loss(*arguments, **keywords))))
            return jnp.float32(seen[-1][1])

        return record

    loss = own_feedforward.auxiliary_loss
    monkeypatch.setattr(own_feedforward, "auxiliary_loss", recorded("feed", loss))
    run = functools.partial(models.hidden_with_auxiliary_loss, segment_ids=ids)
    with jax.disable_jit():
        x, total = run(p, TOKENS, CFG)
        layers = [value for _, value in seen]
        assert len(layers) == 4 and len(set(layers)) == 4
        np.testing.assert_allclose(total, np.mean(layers), rtol=1e-5)
        monkeypatch.setattr(
            own_mixer, "auxiliary_loss", recorded("mix", loss), raising=False
        )
        seen.clear()
        _, total = run(p, TOKENS, CFG)
    means = [np.mean([v for k, v in seen if k == kind]) for kind in ("feed", "mix")]
    assert len(seen) == 8
    np.testing.assert_allclose(total, sum(means), rtol=1e-5)
    np.testing.assert_allclose(x, models.hidden(p, TOKENS, CFG)[0], rtol=1e-4)


def test_the_size_of_the_default_feed_forward_layer():
    """By its own field or by `mlp_hidden`; the parameters stay where they were."""
    assert LMConfig(width=96).feedforward == swiglu.Config(96)
    assert swiglu.Config(96).F == 256
    cfg = LMConfig(width=64, mlp_hidden=96)
    assert cfg == LMConfig(width=64, feedforward=swiglu.Config(64, hidden=96))
    assert models.spec(cfg)["blocks"]["0"]["mlp"]["w_gate"].shape == (4, 64, 96)
    assert dataclasses.replace(cfg, mlp_hidden=32).feedforward.hidden == 32
    assert dataclasses.replace(cfg, width=32).feedforward == swiglu.Config(32, 96)
    block = models.spec(cfg)["blocks"]["0"]
    assert set(block) == {"mixer_norm", "mixer", "mlp_norm", "mlp"}
    assert set(block["mlp"]) == {"w_gate", "w_up", "w_down"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mlp_hidden": 0}, ValueError, "mlp_hidden=0 must be at least 1"),
        ({"mlp_hidden": 8}, ValueError, "mlp_hidden=8 is .* with a field `hidden`"),
        ({"pattern": (swiglu.Config(8),)}, TypeError, "no function 'init_state'"),
        ({"feedforward": 3}, TypeError, "3 is not the Config of a feed-forward layer"),
    ],
)
def test_errors_name_the_value_and_the_rule(changes, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(CFG, **changes)


def test_the_function_that_is_missing_is_named(monkeypatch):
    module = types.ModuleType("unfinished_mixer")
    vars(module).update({f: print for f in ("spec", "init_state", "forward")})
    monkeypatch.setitem(sys.modules, "unfinished_mixer", module)
    cls = dataclasses.make_dataclass("Config", ["width"], module="unfinished_mixer")
    with pytest.raises(TypeError, match="unfinished_mixer, which has no function 'ste"):
        mixer_of(cls(8))
