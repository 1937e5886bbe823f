"""The settings that every run shares, whatever its problem."""

import abc
import dataclasses
import math
import re
from typing import Any, ClassVar

from jaxlab.objectives import Objective
from jaxlab.params import MeshConfig
from jaxlab.training.problem import Problem


@dataclasses.dataclass(frozen=True)
class RunConfig(abc.ABC):
    """The fields that the loop reads; `TrainConfig` and `SearchConfig` have more.

    A config of your own inherits them, and opens a `Problem`.
    """

    name: str = "run"  # of the directory under `directory`
    directory: str = "runs"  # where runs put checkpoints, metrics and pictures
    root: str | None = None  # where its relative paths began; a run fills it in
    mesh: MeshConfig = MeshConfig()
    steps: int = 1000
    seed: int = 0  # decides the first parameters, all noise and the order of the data
    until: float | None = None  # stop once the score is as good as this
    max_minutes: float | None = None  # stop after so long, with a checkpoint
    log_every: int = 10  # steps between lines of metrics
    eval_every: int = 200  # steps between scores
    checkpoint_every: int = 200  # steps between checkpoints
    keep: int = 3  # newest checkpoints kept
    keep_best: int = 0  # checkpoints of the best scores kept besides

    fixed: ClassVar[tuple[str, ...]] = ()
    """Fields that a resumed run must share with the run that was saved."""

    def __post_init__(self):
        for name in ("steps", "log_every", "eval_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.steps >= 2**31:
            raise ValueError(
                f"steps={self.steps} is more than a counter of 32 bits holds; choose "
                "fewer, with larger batches."
            )
        for name in ("keep_best", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is below 0.")
        if self.seed >= 2**32:
            raise ValueError(
                f"seed={self.seed} has more than the 32 bits that a key is made of; "
                "choose one below 2**32."
            )
        if not re.fullmatch(r"[^/\\\x00-\x1f]+", self.name) or self.name in (".", ".."):
            raise ValueError(
                f"name={self.name!r} must be the name of a folder: not empty, without "
                "slashes or control characters. Folders above it belong in directory."
            )
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(
                f"max_minutes={self.max_minutes} must be above 0, or None for no limit."
            )
        if self.until is not None and math.isnan(self.until):
            raise ValueError("until=nan is reached by no score; leave it None.")

    @property
    @abc.abstractmethod
    def learned(self) -> Objective | None:
        """The objective whose parameters a finished run holds; None for none."""

    def resolved(self) -> Any:
        """The config as it is saved, with what it takes from elsewhere filled in."""
        return self

    @abc.abstractmethod
    def open(self, *, resumes: bool) -> Problem:
        """The problem, on the mesh in use.

        Args:
            resumes: whether a checkpoint of the run is there.
        """


def may_differ(cfg: RunConfig) -> list[str]:
    """The fields of a run's model that its parameters do not depend on, dotted."""
    mixers = enumerate(getattr(getattr(cfg, "model", None), "pattern", ()))
    return [
        "model.remat",
        "model.compute_dtype",
        *(
            f"model.pattern.{i}.{name}"
            for i, mixer in mixers
            for name in getattr(mixer, "may_differ", ())
        ),
    ]
