"""Configs that cannot work say why."""

import pytest

from jaxlab.feedforward import feedforward_of, swiglu
from jaxlab.mixers import attention, delta_product, mixer_of


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attention.Config(30, n_heads=4), "width=30 .* n_heads=4"),
        (lambda: attention.Config(12, n_heads=4), "head_size=3 must be even"),
        (lambda: attention.Config(32, n_heads=4, n_kv_heads=3), "n_kv_heads=3"),
        (lambda: attention.Config(32, window=0), "window=0 must be"),
        (lambda: delta_product.Config(30), "width=30 .* n_heads=4"),
        (lambda: attention.Config(32, n_heads=0), "n_heads=0 must be at least 1"),
        (lambda: attention.Config(32, head_size=0), "head_size=0 must be"),
        (lambda: delta_product.Config(32, n_householders=0), "n_householders=0"),
        (lambda: delta_product.Config(32, n_heads=0), "n_heads=0 must be at least 1"),
        (lambda: delta_product.Config(32, key_size=0), "key_size=0 must be"),
        (lambda: delta_product.Config(32, chunk_size=0), "chunk_size=0 must be"),
        (lambda: delta_product.Config(32, beta_max=2.5), r"beta_max=2.5 .*\(0, 2\]"),
        (lambda: delta_product.Config(32, convolution=-1), "convolution=-1"),
    ],
)
def test_bad_configs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_config_of_no_mixer():
    with pytest.raises(TypeError, match="module builtins, which has no function 'spec"):
        mixer_of(object())
    with pytest.raises(TypeError, match="not the Config of a mixer.*'init_state'"):
        mixer_of(swiglu.Config(32))
    with pytest.raises(TypeError, match="not the Config of a feed-forward layer"):
        feedforward_of(object())
