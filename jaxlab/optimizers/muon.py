"""Muon: the momentum of each matrix with all singular values set to one.

For each weight in y = x W of role "matrix" [*stack, in, out], M <- b M + (1 - b) G. The
update is U V^T of M = U S V^T, approximated by five Newton-Schulz iterations, times
0.2 sqrt(max(in, out)), which gives its entries the size of Adam's. So Muon's parameters
and the others, which get Adam, can share one learning rate and one weight decay.

Differs from `optax.contrib.muon` in: weight decay and clipping are those of the other
optimizers here, and the other parameters get Adam without Nesterov's momentum. The
iterations and the momentum, with Nesterov's, are optax's.

Reference: Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
2024. Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982 (for the size).
"""

import dataclasses
from typing import Any

import jax
import optax
from optax import contrib

from jaxlab.optimizers.recipe import from_settings, recipe
from jaxlab.optimizers.schedules import Schedule, WarmupCosine
from jaxlab.optimizers.settings import MEMORY, PERIOD, POSITIVE, RECIPE, check
from jaxlab.params import ParamSpec

RANGES = {
    **RECIPE,
    "momentum": MEMORY,
    "iterations": PERIOD,
    "rms": POSITIVE,
    "b1": MEMORY,
    "b2": MEMORY,
    "eps": POSITIVE,
}


def muon(
    learning_rate: float | optax.Schedule,
    *,
    momentum: float = 0.95,
    iterations: int = 5,
    rms: float = 0.2,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = None,
    specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon on any pytree: U V^T of each matrix's momentum, and Adam for the rest.

    Args:
        learning_rate: a number or a schedule.
        momentum: decay rate of the mean gradient of the matrices.
        iterations: number of Newton-Schulz iterations.
        rms: root mean square of a full-rank update; Adam's is about 0.2.
        b1: decay rate of Adam's mean gradient.
        b2: decay rate of Adam's mean square.
        eps: keeps the denominators from 0.
        weight_decay: each step subtracts this share of the weights, times the learning
            rate; only for the roles "matrix" and "head".
        clip: largest global norm of the gradient; None for no clipping.
        specs: tree of `ParamSpec`; None derives the roles from the arrays, as
            `jaxlab.params.infer` does.

    Returns:
        A transformation whose `update` also takes the parameters.

    Raises:
        ValueError: a setting is outside its range; or, from `init` and `update`, trees
            differ in a leaf, which the message names.

    Reference: Jordan et al., "Muon", 2024; Liu et al., arXiv 2502.16982.
    """
    adam: dict[str, Any] = dict(b1=b1, b2=b2, eps=eps)
    check(RANGES, momentum=momentum, iterations=iterations, rms=rms, **adam)
    matrix = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def dimensions(matrices):  # other parameters are masked, so they are no leaves
        return jax.tree.map(lambda _: matrix, matrices)

    def sized(update, _):
        return update * (rms * max(update.shape[-2:]) ** 0.5)

    def label(spec: ParamSpec) -> str:
        return "muon" if spec.role == "matrix" else "adam"

    orthogonalized = optax.chain(
        contrib.scale_by_muon(
            ns_steps=iterations,
            beta=momentum,
            eps=eps,
            weight_dimension_numbers=dimensions,
        ),
        optax.stateless_with_tree_map(sized),
    )

    def method(specs):
        labels = jax.tree.map(label, specs)
        return optax.partition(
            {"muon": orthogonalized, "adam": optax.scale_by_adam(**adam)}, labels
        )

    return recipe(learning_rate, specs, method, weight_decay=weight_decay, clip=clip)


@dataclasses.dataclass(frozen=True)
class Muon:
    """Settings of Muon for matrices, and of Adam for other parameters."""

    learning_rate: float = 3e-3  # at its peak
    schedule: Schedule = WarmupCosine()
    weight_decay: float = 0.1  # multiplied by the learning rate
    momentum: float = 0.95  # decay rate of Muon's mean gradient
    iterations: int = 5  # number of Newton-Schulz iterations
    rms: float = 0.2  # root mean square of a full-rank update; Adam's is similar
    b1: float = 0.9  # decay rate of Adam's mean gradient
    b2: float = 0.95  # decay rate of Adam's mean square
    eps: float = 1e-8
    clip: float | None = 1.0  # largest global norm of the gradient; None: no clipping

    def __post_init__(self):
        check(RANGES, **vars(self))

    def build(self, specs: Any, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation for parameters `specs` and a run of `steps`."""
        return from_settings(muon, self, specs, steps)
