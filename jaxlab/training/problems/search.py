"""Runs of methods that make their own data: evolution strategies, policy gradients."""

import dataclasses
from typing import Protocol

from jaxlab.models import LMConfig
from jaxlab.objectives import NextToken, Objective
from jaxlab.training.config import RunConfig
from jaxlab.training.problem import Problem
from jaxlab.training.problems.fine_tuning import FineTuning
from jaxlab.training.problems.policies import PolicySearch
from jaxlab.training.source import TextData


class SearchTask(Protocol):
    """A task: settings that open a problem. Its fields are options of the run."""

    def open(self, steps: int, seed: int, *, resumes: bool) -> Problem: ...


@dataclasses.dataclass(frozen=True)
class SearchConfig(RunConfig):
    """A search. `configs/` holds one of these a file.

    The mesh's axes data and fsdp divide a population. A step is a generation, or an
    update of a policy gradient.
    """

    name: str = "search"  # of the directory under `directory`
    task: SearchTask = PolicySearch()
    steps: int = 100  # generations, or updates of a policy gradient
    log_every: int = 1  # steps between lines of metrics
    eval_every: int = 10  # steps between scores
    checkpoint_every: int = 100  # steps between checkpoints

    fixed = ("task", "seed")

    @property
    def _tuning(self) -> FineTuning | None:
        return self.task if isinstance(self.task, FineTuning) else None

    @property
    def model(self) -> LMConfig | None:
        """The language model that is searched, if it is one."""
        return None if self._tuning is None else self._tuning.model

    @property
    def data(self) -> TextData | None:
        """The text that this model was trained on."""
        return None if self._tuning is None else self._tuning.data

    @property
    def learned(self) -> Objective | None:
        """The objective of the run that a fine-tuning starts from."""
        return None if self.model is None else NextToken(self.model)

    def resolved(self) -> "SearchConfig":
        """With the model and the data of the run that a fine-tuning starts from."""
        if self._tuning is None:
            return self
        return dataclasses.replace(self, task=self._tuning.resolved())

    def open(self, *, resumes: bool) -> Problem:
        """The problem of the task."""
        return self.task.open(self.steps, self.seed, resumes=resumes)
