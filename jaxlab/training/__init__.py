"""Training: configs, the loop, checkpoints and metrics."""

from jaxlab.training.config import TrainConfig
from jaxlab.training.loop import train
from jaxlab.training.source import TaskData, TextData

__all__ = ["TaskData", "TextData", "TrainConfig", "train"]
