"""Small pure functions shared by mixers and models."""

from jaxlab.layers import initial, rows, segments
from jaxlab.layers.convolution import convolution_step, short_convolution
from jaxlab.layers.norm import l2_normalize, rms_norm
from jaxlab.layers.output import gated_output
from jaxlab.layers.rotary import rotary
from jaxlab.layers.softmax_attention import (
    KVCache,
    init_cache,
    softmax_attention,
    softmax_attention_step,
)

__all__ = [
    "KVCache",
    "convolution_step",
    "gated_output",
    "init_cache",
    "initial",
    "l2_normalize",
    "rms_norm",
    "rotary",
    "rows",
    "segments",
    "short_convolution",
    "softmax_attention",
    "softmax_attention_step",
]
