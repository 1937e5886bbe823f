"""Small pure functions shared by mixers and models."""

from jaxlab.layers import segments
from jaxlab.layers.convolution import convolution_step, short_convolution
from jaxlab.layers.mlp import swiglu, swiglu_spec
from jaxlab.layers.norm import l2_normalize, rms_norm
from jaxlab.layers.rotary import rotary

__all__ = [
    "convolution_step",
    "l2_normalize",
    "rms_norm",
    "rotary",
    "segments",
    "short_convolution",
    "swiglu",
    "swiglu_spec",
]
