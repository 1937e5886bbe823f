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

from jaxlab.optimizers.recipe import recipe
from jaxlab.optimizers.schedules import Schedule, WarmupCosine
from jaxlab.params import select


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
    clip: float = 1.0  # largest norm of the whole gradient

    def build(self, specs: Any, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation for parameters `specs` and a run of `steps`."""
        matrix = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

        def dimensions(matrices):  # other parameters are masked: no leaves
            return jax.tree.map(lambda _: matrix, matrices)

        def sized(update, _):
            return update * (self.rms * max(update.shape[-2:]) ** 0.5)

        muon = optax.chain(
            contrib.scale_by_muon(
                ns_steps=self.iterations,
                beta=self.momentum,
                eps=self.eps,
                weight_dimension_numbers=dimensions,
            ),
            optax.stateless_with_tree_map(sized),
        )
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        return recipe(
            *(self, specs, steps),
            optax.partition(
                {"muon": muon, "adam": adam},
                select(specs, [("matrix", "muon"), (".*", "adam")]),
            ),
        )
