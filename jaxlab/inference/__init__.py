"""Generating tokens from a prompt."""

from jaxlab.decoding import SamplingParams, sample_token
from jaxlab.inference.generate import generate

__all__ = ["SamplingParams", "generate", "sample_token"]
