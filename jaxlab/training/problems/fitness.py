"""Readings of methods that learn from a fitness or a reward."""

from collections.abc import Mapping
from typing import Any

from jaxlab.training.problem import Reading, floats

ADVICE = "Try a lower learning_rate of the optimizer, or a smaller sigma."


def read_figures(step: int, batch: Any, figures: Mapping[str, Any]) -> Reading:
    """Every figure as a number, with what a compiled step cannot refuse."""
    reading = floats(step, batch, figures)
    warnings = []
    if reading.values.get("no_signal") == 1:
        warnings.append(
            "Everything got the same fitness or reward, so nothing was learned from "
            "it; try larger noise, or a finer fitness."
        )
    if reading.values.get("not_finite", 0) > 0:
        warnings.append(
            "The fitness of some members is not finite and counts as the worst; try a "
            "smaller sigma."
        )
    return reading._replace(warnings=warnings)
