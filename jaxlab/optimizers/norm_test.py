"""The norm test: a batch that grows until its gradient is surer than its noise.

A batch of b rows passes the test if the variance of its mean gradient g is small beside
g. In J groups of b / J rows with mean gradients g_j,

    V = (b / J) / (J - 1) sum_j ||g_j - g||^2      (the variance of one row's gradient),
    passes if V / b <= eta^2 ||g||^2,   else the next b = ceil(V / (eta^2 ||g||^2)).

It never shrinks. Since g is the mean of the g_j, the sum is
sum_j ||g_j||^2 - J ||g||^2: a training step hands over two numbers, and the host
decides (`BatchController`).

Where there is nothing but noise, ||g||^2 is about V / b, so that one test asks for at
most about b / eta^2; where the batch is just large enough, it asks for 1 / (1 + eta^2)
of what the true gradient would. With few groups V scatters, and as the batch never
shrinks its largest value counts: take more groups, or the means of both numbers over a
few steps of one batch.

Differs from the paper in: the batch is rounded up to a power of two micro-batches, so
that few programs are compiled; the test by coordinates needs the sums of each
coordinate, and the inner-product test each group's product with the mean, which is
known only after the last group, and neither is here.

Reference: Lau, Liu, Kolar, AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient
Methods, arXiv 2402.11215.
"""

import dataclasses
import math
from typing import NamedTuple

from jaxlab.optimizers.settings import PARTS, Range, check

ROWS = Range(
    "a whole number of rows, at least 1",
    "it is the size of a batch",
    least=1.0,
    whole=True,
)
SQUARES = Range("finite and at least 0", "it comes from squared norms", least=0.0)
RANGES = {
    "eta": Range(
        "between 0 and 1",
        "it is the noise of the mean gradient over its norm",
        above=0.0,
        below=1.0,
    ),
    "largest": ROWS,
    "batch_size": ROWS,
    "batch": ROWS,
    "accumulate": PARTS,
    "groups": PARTS,
    "squares": SQUARES,
    "mean_square": SQUARES,
    "variance": SQUARES,
}


def gradient_variance(
    squares: float, mean_square: float, groups: int, batch: int
) -> float:
    """Variance of one row's gradient, all coordinates together: V above.

    A step that accumulates parts, or adds over devices, keeps beside the sum of their
    gradients one number, the sum of the squared norms, and at its end takes the squared
    norm of the mean. No gradient is kept, and devices exchange one number more.

    The g_j are those whose mean is the gradient of the step. Where groups weigh
    differently, as when they have different numbers of targets, s_j is the gradient of
    a group's sum and W the weight of the whole batch, g = sum_j s_j / W and so
    g_j = J s_j / W: ``squares`` is (J / W)^2 sum_j ||s_j||^2.

    Args:
        squares: sum_j ||g_j||^2.
        mean_square: ||g||^2, before clipping.
        groups: J, at least 2.
        batch: rows of all groups together.

    Returns:
        V, and 0 where rounding would leave it below.

    Raises:
        ValueError: fewer than two groups, or numbers that are no sums of squares.
    """
    check(RANGES, groups=groups, batch=batch)
    if groups < 2:
        raise ValueError(
            f"The norm test compares groups of a batch, and groups={groups}; "
            "accumulate at least 2 micro-batches, or take the gradients of 2 devices."
        )
    check(RANGES, squares=squares, mean_square=mean_square)
    spread = max(float(squares) - groups * float(mean_square), 0.0)
    return batch / groups / (groups - 1) * spread


def wanted_batch(variance: float, mean_square: float, eta: float) -> float:
    """Rows whose mean gradient passes the norm test: V / (eta^2 ||g||^2).

    Infinite where there is noise and no gradient; 0 where there is neither.

    Raises:
        ValueError: `eta` is not between 0 and 1, or a number is no mean of squares.
    """
    check(RANGES, variance=variance, mean_square=mean_square, eta=eta)
    if variance == 0:
        return 0.0
    signal = eta**2 * float(mean_square)
    return variance / signal if signal > 0 else math.inf


class BatchState(NamedTuple):
    """State of a `BatchController`, to be saved with the position in the data.

    Attributes:
        wanted: rows that the tests so far have asked for, before rounding.
    """

    wanted: int


@dataclasses.dataclass(frozen=True)
class BatchController:
    """The batch of each step of a run, in accumulated micro-batches.

    Made by `BatchGrowth.build`. `jaxlab.training.train` obeys it (the field `growth` of
    its configs). A loop of your own starts from ``state = init()``, gives each step
    ``parts(state)`` micro-batches, and after it, or every few steps, calls
    ``state = update(state, ...)`` with what the step measured. One program is compiled
    for each power of two that is reached.

    Attributes:
        eta: largest noise of the mean gradient over its norm.
        smallest: rows of the first batch.
        largest: rows that no batch exceeds.
        micro_batch: rows that go through the model at once.
    """

    eta: float
    smallest: int
    largest: int
    micro_batch: int

    def init(self) -> BatchState:
        """The state before the first step."""
        return BatchState(self.smallest)

    def parts(self, state: BatchState) -> int:
        """Micro-batches of the next step, a power of two."""
        enough = -(-state.wanted // self.micro_batch)  # rounded up
        return 1 << (enough - 1).bit_length()

    def rows(self, state: BatchState) -> int:
        """Rows of the next step."""
        return self.parts(state) * self.micro_batch

    def update(
        self, state: BatchState, squares: float, mean_square: float, groups: int
    ) -> BatchState:
        """The state after the norm test of a step with ``rows(state)`` rows.

        Args:
            state: by which the step was made.
            squares: sum_j ||g_j||^2 over the groups, see `gradient_variance`.
            mean_square: ||g||^2 of the step's gradient.
            groups: J, the parts of the step, times the devices where each has its own.

        Raises:
            ValueError: as for `gradient_variance`.
        """
        variance = gradient_variance(squares, mean_square, groups, self.rows(state))
        wanted = min(wanted_batch(variance, mean_square, self.eta), self.largest)
        return BatchState(max(state.wanted, math.ceil(wanted)))


@dataclasses.dataclass(frozen=True)
class BatchGrowth:
    """Settings of a batch that grows by the norm test."""

    eta: float = 0.2  # largest noise of the mean gradient over its norm
    largest: int = 1024  # rows

    def __post_init__(self):
        check(RANGES, **vars(self))

    def build(self, batch_size: int, accumulate: int) -> BatchController:
        """The controller of a run that starts with `batch_size` rows a step.

        Args:
            batch_size: rows of the first step, over all devices.
            accumulate: parts of this batch; the model sees one at a time.

        Raises:
            ValueError: a batch of one part, or of unequal ones; a first or a largest
                batch that is no power of two of these parts; a first batch above the
                largest.
        """
        check(RANGES, batch_size=batch_size, accumulate=accumulate)
        if accumulate < 2:
            raise ValueError(
                "growth compares the gradients of a batch's parts, and "
                f"accumulate={accumulate} leaves one; set accumulate to 2 or more."
            )
        micro_batch, rest = divmod(batch_size, accumulate)
        if rest or micro_batch < 1:
            raise ValueError(
                f"A batch of {batch_size} rows does not divide into "
                f"accumulate={accumulate} equal parts."
            )
        for name, rows in (("batch", batch_size), ("largest", self.largest)):
            count, rest = divmod(rows, micro_batch)
            if rest or count < 1 or count & (count - 1):
                raise ValueError(
                    f"{name}={rows} rows are not 1, 2, 4, 8, ... parts of "
                    f"{micro_batch} rows; change one of them."
                )
        if batch_size > self.largest:
            raise ValueError(
                f"A first batch of {batch_size} rows is above largest={self.largest}; "
                "a batch never shrinks."
            )
        return BatchController(self.eta, batch_size, self.largest, micro_batch)
