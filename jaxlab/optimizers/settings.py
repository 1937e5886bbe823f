"""Ranges of the numbers that optimizers are set by, and one error for all outside."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import optax
from jax.core import Tracer


class Optimizer(Protocol):
    """Settings that a config may name as its optimizer, such as `AdamW`.

    Settings whose transformation takes statistics of the products of weights say of
    which by a method ``tapped(specs)``, a tree of booleans, as `MKOR` does.
    """

    def build(self, specs: Any, steps: int) -> optax.GradientTransformation:
        """The transformation for parameters `specs` and a run of `steps`."""
        ...


@dataclasses.dataclass(frozen=True)
class Range:
    """The finite numbers between bounds; NaN is in no range.

    Attributes:
        rule: which numbers, to follow "must be".
        way_out: what the number does or which one to take, to end the sentence.
        least: smallest number.
        above: excluded lower bound.
        most: largest number.
        below: excluded upper bound.
        whole: whether numbers are integers.
        optional: whether None, for off, is allowed.
        infinite: whether infinity is allowed.
    """

    rule: str
    way_out: str
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    whole: bool = False
    optional: bool = False
    infinite: bool = False

    def contains(self, value: Any) -> bool:
        """Whether a number, or None, is in the range."""
        if value is None:
            return self.optional
        try:
            number = float(value)
        except (TypeError, ValueError):
            return False
        if number == math.inf:
            return self.infinite
        inside = self.least <= number <= self.most and self.above < number < self.below
        return inside and (number.is_integer() or not self.whole)


RATE = Range("finite and at least 0", "0 leaves the parameters as they are", least=0.0)
DECAY = Range(
    "finite and at least 0",
    "it pulls weights to zero by this share of the learning rate a step, and 0 does "
    "not",
    least=0.0,
)
CLIP = Range(
    "above 0, or None",
    "it is the largest norm of the whole gradient, and None does not clip",
    above=0.0,
    optional=True,
    infinite=True,
)
MEMORY = Range(
    "at least 0 and below 1",
    "it is the share that a mean keeps of the past at each step, such as 0.9",
    least=0.0,
    below=1.0,
)
POSITIVE = Range(
    "finite and above 0",
    "it keeps a denominator from 0 where no gradient was seen, such as 1e-8",
    above=0.0,
)
PERIOD = Range(
    "a whole number of steps, at least 1",
    "1 is every step",
    least=1.0,
    whole=True,
)
SIDE = Range(
    "a whole number, at least 1",
    "it is the longest side of a matrix that gets a square factor",
    least=1.0,
    whole=True,
)
SHARE = Range("in [0, 1]", "it is a share", least=0.0, most=1.0)
STEPS = Range(
    "a whole number of steps, at least 0", "0 leaves it out", least=0.0, whole=True
)

RECIPE = {"learning_rate": RATE, "weight_decay": DECAY, "clip": CLIP}
"""Ranges of what all recipes share."""


def check(ranges: Mapping[str, Range], **values: Any) -> None:
    """Refuse numbers outside their range; traced numbers may be any.

    Args:
        ranges: of the settings by name.
        values: settings; those without a range, and schedules, are not looked at.

    Raises:
        ValueError: a number outside its range, with its name, the rule and a way out.
    """
    for name, value in values.items():
        if name not in ranges or isinstance(value, Tracer) or callable(value):
            continue
        known = ranges[name]
        if not known.contains(value):
            raise ValueError(f"{name}={value} must be {known.rule}; {known.way_out}.")
