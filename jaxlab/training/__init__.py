"""Training: the loop of every run, its problems and metrics."""

from jaxlab.training.config import RunConfig
from jaxlab.training.loop import train
from jaxlab.training.problem import Curve, Problem, Reading
from jaxlab.training.problems import SearchConfig, TrainConfig
from jaxlab.training.restore import Run, load_run, load_run_tokenizer
from jaxlab.training.source import TaskData, TextData

__all__ = [
    "Curve",
    "Problem",
    "Reading",
    "Run",
    "RunConfig",
    "SearchConfig",
    "TaskData",
    "TextData",
    "TrainConfig",
    "load_run",
    "load_run_tokenizer",
    "train",
]
