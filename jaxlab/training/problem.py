"""A run, as the loop of `jaxlab.training.train` sees it.

Gradient training, evolution strategies and policy gradients are problems, and so is
whatever changes a state step by step. The loop has what they share: signals, resuming,
checkpoints, metrics, progress and pictures.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array


class Batches(Protocol):
    """Endless batches whose position is saved with the state."""

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON values."""
        ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Reading(NamedTuple):
    """The figures of a step as numbers, and sentences about them.

    Attributes:
        values: written to the metrics every `log_every` steps; all must be finite.
        tokens: read by all steps so far, for the speed; None where nothing is read.
        events: written at this step, whatever `log_every` is.
        messages: sentences for the terminal.
        warnings: sentences that are logged once a run each.
    """

    values: dict[str, float]
    tokens: int | None = None
    events: Mapping[str, float] = {}
    messages: Sequence[str] = ()
    warnings: Sequence[str] = ()


class Curve(NamedTuple):
    """The picture of a run.

    Attributes:
        file: its name in the run's directory.
        train, held_out: figure of the steps, and score, that are drawn.
        labels: of the two.
        unit: of both, as the axis says.
        baselines: levels drawn beside them, by name.
    """

    file: str
    train: str
    held_out: str
    labels: tuple[str, str]
    unit: str
    baselines: Mapping[str, float] = {}


def floats(step: int, batch: Any, figures: Mapping[str, Any]) -> Reading:
    """Every figure as a number."""
    del step, batch
    return Reading({name: float(x) for name, x in figures.items()})


def listed(scores: Mapping[str, float]) -> str:
    """Every score by its name: ``return 9.12, return_worst 3``."""
    return ", ".join(f"{name} {x:.4g}" for name, x in scores.items())


@dataclasses.dataclass(frozen=True)
class Problem:
    """A run, opened on the mesh in use.

    Attributes:
        abstract: the state's shapes, dtypes and shardings, which no step changes; what
            has no sharding is restored to every device.
        init: makes the first state.
        batches: what the steps take, in their order.
        step: (state, batch, key) to the next state and the step's figures. It may
            donate the state; the key is the seed's, folded with the step's number.
        score: the scores of a state.
        headline: what is run, for the first line.
        watched: the figure that the progress line shows.
        goal: the score that `until` and `keep_best` look at.
        greater: whether a greater `goal` is better.
        curve: the picture, given the last scores.
        read: (step, batch, figures) to a `Reading`, in the order of the steps.
        split: what the names of scores begin with in the metrics.
        describe: scores in words.
        sample: something that the last state makes, to be printed; or None.
        flops_per_token: operations of a step a token, for the utilisation.
        advice: what to try when a figure is not finite.
        keeps: files that the run's directory keeps a copy of, by their names there.
    """

    abstract: Any
    init: Callable[[], Any]
    batches: Batches
    step: Callable[[Any, Any, Array], tuple[Any, dict[str, Any]]]
    score: Callable[[Any], dict[str, float]]
    headline: str
    watched: str
    goal: str
    curve: Callable[[Mapping[str, float]], Curve]
    greater: bool = False
    read: Callable[[int, Any, dict[str, Any]], Reading] = floats
    split: str = "score"
    describe: Callable[[Mapping[str, float]], str] = listed
    sample: Callable[[Any], str | None] = lambda state: None
    flops_per_token: float | None = None
    advice: str = "Try a lower learning rate."
    keeps: Mapping[str, Path] = dataclasses.field(default_factory=dict)
