"""Training: configs, the loop and metrics."""

from jaxlab.training.config import TrainConfig
from jaxlab.training.loop import train
from jaxlab.training.restore import Run, load_run
from jaxlab.training.source import TaskData, TextData

__all__ = [
    "Run",
    "TaskData",
    "TextData",
    "TrainConfig",
    "load_run",
    "train",
]
