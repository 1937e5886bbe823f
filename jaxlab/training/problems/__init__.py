"""Problems that a run can solve, one kind a file."""

from jaxlab.training.problems.fine_tuning import FineTuning
from jaxlab.training.problems.gradient import TrainConfig
from jaxlab.training.problems.integers import IntegerTraining
from jaxlab.training.problems.policies import ADAM, PolicySearch
from jaxlab.training.problems.search import SearchConfig

__all__ = [
    "ADAM",
    "FineTuning",
    "IntegerTraining",
    "PolicySearch",
    "SearchConfig",
    "TrainConfig",
]
