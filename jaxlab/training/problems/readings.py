"""Readings that problems share: an optimizer's events, a fitness or a reward."""

from collections.abc import Mapping
from typing import Any

from jaxlab.training.problem import Reading, floats

LOWER_RATE = "Try a lower learning_rate of the optimizer."
SMALLER_SIGMA = "Try a lower learning_rate of the optimizer, or a smaller sigma."


def read_events(
    step: int, reading: Reading, sentences: Mapping[str, str], updates: int = 1
) -> Reading:
    """Turn the figures that are an optimizer's events into messages of their step.

    Args:
        step: the number of the step.
        reading: its values include, for each event, the number of the update at which
            it occurred, or one below 0.
        sentences: of the events, from `jaxlab.optimizers.events`.
        updates: of the optimizer in a step.
    """
    values = dict(reading.values)
    before, now = (step - 1) * updates, step * updates
    occurred = [name for name in sentences if before < values.pop(name) <= now]
    return reading._replace(
        values=values,
        events={name: float(step) for name in occurred},
        messages=[sentences[name] for name in occurred],
    )


def read_fitness(step: int, batch: Any, figures: Mapping[str, Any]) -> Reading:
    """Every figure as a number, and warnings of what a compiled step cannot refuse."""
    reading = floats(step, batch, figures)
    warnings = []
    if reading.values.get("no_signal") == 1:
        warnings.append(
            "Everything got the same fitness or reward, so nothing was learned from "
            "it; try larger noise, or a finer fitness."
        )
    if reading.values.get("not_finite", 0) > 0:
        warnings.append(
            "Some fitness or rewards are not finite and count as the worst finite one "
            "(`not_finite` in the metrics); look at the reward, or try a smaller sigma."
        )
    return reading._replace(warnings=warnings)
