"""Muon: the momentum of each matrix with its singular values made one.

M <- b M + (1 - b) G for each weight in y = x W of role "matrix" [*stack, in, out]; the
update is U V^T of M = U S V^T, nearly, by five Newton-Schulz iterations, times
0.2 sqrt(max(in, out)), which gives its entries the size of Adam's. So one learning rate
and one weight decay serve Muon's parameters and the others, which get Adam.

Differs from `optax.contrib.muon` in: weight decay and clipping are those of the other
optimizers here, and the others get Adam without Nesterov's momentum. The iterations
and the momentum, with Nesterov's, are optax's.

Reference: Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
2024. Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982 (the size).
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
    """Muon on any pytree: U V^T of the momentum of each matrix; Adam for the rest.

    Args:
        learning_rate: a number or a schedule.
        momentum: memory of the mean gradient of the matrices.
        iterations: of Newton and Schulz.
        rms: root mean square of a full-rank update; 0.2 is about that of Adam's.
        b1: memory of Adam's mean gradient.
        b2: memory of Adam's mean square.
        eps: keeps the denominators from 0.
        weight_decay: share of the weights that is taken away at each step, times the
            learning rate; of matrices and heads, not of other roles.
        clip: largest norm of the whole gradient; None for no clipping.
        specs: tree of `ParamSpec`; None derives the roles from the arrays, as
            `jaxlab.params.infer` does.

    Returns:
        A transformation whose `update` takes the parameters too.

    Raises:
        ValueError: a setting outside its range; or, at `init` and `update`, trees that
            differ in a leaf, which is named.

    Reference: Jordan et al., "Muon", 2024; Liu et al., arXiv 2502.16982.
    """
    own: dict[str, Any] = dict(momentum=momentum, iterations=iterations, rms=rms)
    adam: dict[str, Any] = dict(b1=b1, b2=b2, eps=eps)
    check(RANGES, **own, **adam)
    matrix = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def dimensions(matrices):  # other parameters are masked: no leaves
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
    """Settings of Muon, and of Adam for what is no matrix."""

    learning_rate: float = 3e-3  # the peak
    schedule: Schedule = WarmupCosine()
    weight_decay: float = 0.1  # times the learning rate
    momentum: float = 0.95  # memory of Muon's mean gradient
    iterations: int = 5  # of Newton and Schulz
    rms: float = 0.2  # root mean square of a full-rank update, as Adam's
    b1: float = 0.9  # memory of Adam's mean gradient
    b2: float = 0.95  # memory of Adam's mean square
    eps: float = 1e-8
    clip: float | None = 1.0  # largest norm of the whole gradient; None for any

    def __post_init__(self):
        check(RANGES, **vars(self))

    def build(self, specs: Any, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation for parameters `specs` and a run of `steps`."""
        return from_settings(muon, self, specs, steps)
