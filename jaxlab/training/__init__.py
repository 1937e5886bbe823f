"""Training: configs, the loop, checkpoints and metrics."""

from jaxlab.training.checkpoint import CheckpointError, Checkpoints
from jaxlab.training.config import TrainConfig
from jaxlab.training.loop import train
from jaxlab.training.restore import Run, load_run
from jaxlab.training.source import TaskData, TextData

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Run",
    "TaskData",
    "TextData",
    "TrainConfig",
    "load_run",
    "train",
]
