"""What is learned: pure functions of parameters, a batch and a key.

An objective is any object, best a frozen dataclass, with

    spec() -> tree of ParamSpec
    loss(params, batch, key) -> (total, weight, figures)

`total` is a sum of losses over the batch and `weight` what it is divided by, both
scalars, so that a batch may come in parts: the gradient is that of the sum of their
totals over the sum of their weights. `figures` are further sums for the metrics: a
scalar is shown divided by the weight, a `Ratio` as its total over its own weight. A
figure called "loss" is shown in the place of total / weight.

`gradient_step` makes one update of parameters by an optimizer. It knows no objective
and no method. The laws of objectives (`tests/objectives/test_objective_laws.py`):
accumulated parts equal the whole batch, a row of weight zero is no row, a mesh changes
nothing, and one key gives one loss.
"""

from jaxlab.objectives.gradient import gradient_step
from jaxlab.objectives.next_token import NextToken
from jaxlab.objectives.objective import Objective, Ratio
from jaxlab.objectives.scores import heldout_scores

__all__ = ["NextToken", "Objective", "Ratio", "gradient_step", "heldout_scores"]
