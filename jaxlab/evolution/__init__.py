"""Evolution strategies: gradients from fitness alone."""

from jaxlab.evolution.eggroll import EGGROLL, State, Strategy, es_value_and_grad
from jaxlab.evolution.shaping import CentredRanks, GroupZScore, Raw, Sign, ZScore

__all__ = [
    "EGGROLL",
    "CentredRanks",
    "GroupZScore",
    "Raw",
    "Sign",
    "State",
    "Strategy",
    "ZScore",
    "es_value_and_grad",
]
