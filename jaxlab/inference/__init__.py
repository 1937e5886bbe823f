"""Generating text."""

from jaxlab.inference.generate import generate
from jaxlab.inference.sampling import SamplingParams, sample_token

__all__ = ["SamplingParams", "generate", "sample_token"]
