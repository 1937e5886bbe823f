"""Evolution strategies: gradients from fitness alone."""

from jaxlab.evolution.eggroll import EGGROLL, Decay, State, Strategy, es_value_and_grad
from jaxlab.evolution.integer import IntegerEGGROLL, IntegerState, IntegerStrategy
from jaxlab.evolution.shaping import CentredRanks, GroupZScore, Raw, Sign, ZScore

__all__ = [
    "EGGROLL",
    "CentredRanks",
    "Decay",
    "GroupZScore",
    "IntegerEGGROLL",
    "IntegerState",
    "IntegerStrategy",
    "Raw",
    "Sign",
    "State",
    "Strategy",
    "ZScore",
    "es_value_and_grad",
]
