"""Ranges of the settings of optimizers, and one error for values outside them."""

import dataclasses
import math
import operator
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
        rule: the allowed numbers in words that follow "must be".
        way_out: the end of the message: what the number does, or which one to choose.
        least: smallest number.
        above: excluded lower bound.
        most: largest number.
        below: excluded upper bound.
        whole: whether only integers are allowed, and no floats such as 2.0.
        optional: whether None is allowed, which turns the setting off.
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
            number = operator.index(value) if self.whole else float(value)
        except (TypeError, ValueError):
            return False
        if number == math.inf:
            return self.infinite
        return self.least <= number <= self.most and self.above < number < self.below


@dataclasses.dataclass(frozen=True)
class Built:
    """Settings that something is built from, as a schedule or an optimizer.

    Attributes:
        rule, way_out: as of a `Range`.
    """

    rule: str
    way_out: str

    def contains(self, value: Any) -> bool:
        """Whether a value is an instance with a method ``build``."""
        return not isinstance(value, type) and hasattr(value, "build")


RATE = Range("finite and at least 0", "0 leaves the parameters as they are", least=0.0)
DECAY = Range(
    "finite and at least 0",
    "each step shrinks weights by this share times the learning rate, and 0 turns it "
    "off",
    least=0.0,
)
CLIP = Range(
    "above 0, or None",
    "it is the largest global norm of the gradient, and None turns clipping off",
    above=0.0,
    optional=True,
    infinite=True,
)
MEMORY = Range(
    "at least 0 and below 1",
    "it is the share of the past that a mean keeps at each step, such as 0.9",
    least=0.0,
    below=1.0,
)
POSITIVE = Range(
    "finite and above 0",
    "it keeps a denominator from being 0 where all gradients were 0, such as 1e-8",
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
PARTS = Range("a whole number, at least 1", "1 is a whole batch", least=1.0, whole=True)
SEED = Range(
    "a whole number of at most 32 bits",
    "it seeds random draws",
    least=-(2.0**31),
    below=2.0**32,
    whole=True,
)
SHARE = Range("in [0, 1]", "it is a share", least=0.0, most=1.0)
STEPS = Range(
    "a whole number of steps, at least 0", "0 leaves it out", least=0.0, whole=True
)

SCHEDULE = Built("the settings of a schedule", "WarmupCosine() is one")
RECIPE = {
    "learning_rate": RATE,
    "schedule": SCHEDULE,
    "weight_decay": DECAY,
    "clip": CLIP,
}
"""Ranges of the settings that all optimizers share."""


def check(ranges: Mapping[str, Range | Built], **values: Any) -> None:
    """Refuse settings outside their range; traced numbers are not checked.

    Args:
        ranges: the ranges by the names of settings.
        values: settings; functions of the step in the place of numbers, and settings
            without a range, are not checked.

    Raises:
        ValueError: a setting is outside its range; names it, the rule and the way out.
    """
    for name, value in values.items():
        known = ranges.get(name)
        if known is None or isinstance(value, Tracer):
            continue
        if isinstance(known, Range) and callable(value):
            continue
        if not known.contains(value):
            raise ValueError(f"{name}={value} must be {known.rule}; {known.way_out}.")
