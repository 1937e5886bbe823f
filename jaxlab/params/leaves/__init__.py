"""Kinds of weights, one per file; `jaxlab.params.products` defines the interface."""

from jaxlab.params.leaves.low_rank import LowRank
from jaxlab.params.leaves.quantized import Quantized, quantize
from jaxlab.params.leaves.tapped import (
    Tap,
    Tapped,
    divided_taps,
    sketch_taps,
    tap,
    tapped,
    untap,
)

__all__ = [
    "LowRank",
    "Quantized",
    "Tap",
    "Tapped",
    "divided_taps",
    "sketch_taps",
    "quantize",
    "tap",
    "tapped",
    "untap",
]
