"""Evolution in integers: a language model of int8 and the strategy that trains it."""

from jaxlab.evolution.integer.strategy import (
    TEXTS,
    IntegerEGGROLL,
    IntegerState,
    IntegerStrategy,
)

__all__ = ["TEXTS", "IntegerEGGROLL", "IntegerState", "IntegerStrategy"]
