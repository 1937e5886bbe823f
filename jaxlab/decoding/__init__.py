"""Decoding: tokens drawn one after another from a model."""

from jaxlab.decoding.loop import Completions, decode, prefill
from jaxlab.decoding.sampling import SamplingParams, adjusted_logits, sample_token

__all__ = [
    "Completions",
    "SamplingParams",
    "adjusted_logits",
    "decode",
    "prefill",
    "sample_token",
]
