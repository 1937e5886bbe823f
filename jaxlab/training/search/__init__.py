"""Runs of methods that make their own data: evolution strategies, policy gradients."""

from jaxlab.training.search.fine_tuning import FineTuning
from jaxlab.training.search.integers import IntegerTraining
from jaxlab.training.search.policies import ADAM, PolicySearch
from jaxlab.training.search.problem import Problem
from jaxlab.training.search.run import SearchConfig, search

__all__ = [
    "ADAM",
    "FineTuning",
    "IntegerTraining",
    "PolicySearch",
    "Problem",
    "SearchConfig",
    "search",
]
