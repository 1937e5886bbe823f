"""Training objectives: pure functions of parameters, a batch and a key.

An objective is any object, preferably a frozen dataclass, with

    spec() -> tree of ParamSpec
    loss(params, batch, key) -> (total, weight, figures)

`total` is a sum of losses over the batch and `weight` its divisor, both scalars. So a
batch can be processed in parts: the gradient is that of the sum of their totals over
the sum of their weights. `figures` are further sums for the metrics: a scalar is
reported divided by the weight, a `Ratio` as its total over its own weight. A figure
called "loss" is reported instead of total / weight.

`gradient_step` updates parameters with an optimizer, whatever the objective and the
method. The laws of objectives (`tests/objectives/test_objective_laws.py`): accumulated
parts equal the whole batch, a row of weight zero has no effect, a mesh changes nothing,
and the same key gives the same loss.
"""

from jaxlab.objectives.gradient import gradient_step
from jaxlab.objectives.next_token import NextToken
from jaxlab.objectives.objective import Objective, Ratio
from jaxlab.objectives.scores import heldout_scores

__all__ = ["NextToken", "Objective", "Ratio", "gradient_step", "heldout_scores"]
