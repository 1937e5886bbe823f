"""What a training run is made of."""

import dataclasses
from typing import Any

from jaxlab.inference import SamplingParams
from jaxlab.models import LMConfig
from jaxlab.objectives import NextToken, Objective
from jaxlab.optimizers import AdamW, BatchController, BatchGrowth, Optimizer
from jaxlab.params import MeshConfig
from jaxlab.training.source import TaskData, TextData


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. `configs/` holds one of these a file.

    With `growth` the batch follows AdAdaGrad's norm test: it starts with `batch_size`
    rows, and a step with k times as many, k a power of two, accumulates the parts of
    the next k batches of the data, each of ``batch_size // accumulate`` rows. A test
    changes the batch from the second step after its own. `steps` and all that is
    counted in steps, such as schedules of learning rates, are updates of the
    parameters, however many rows each takes.
    """

    name: str = "run"  # of the directory under `directory`
    directory: str = "runs"  # where runs put checkpoints, metrics and pictures
    data: TextData | TaskData = TextData()
    model: LMConfig = LMConfig()
    objective: Any = None  # what is learned; None: the next token, by `model`
    optimizer: Optimizer = AdamW()
    frozen: tuple[str, ...] = ()  # patterns of paths of parameters that stay, or roles
    mesh: MeshConfig = MeshConfig()
    batch_size: int = 32  # rows a step, over all devices
    accumulate: int = 1  # parts of a batch that go through the model one by one
    growth: BatchGrowth | None = None  # of the batch, from batch_size on
    steps: int = 1000  # updates of the parameters
    init_from: str | None = None  # another run's directory, for first parameters
    seed: int = 0  # of parameters and data order
    max_minutes: float | None = None  # stop after so long, with a checkpoint
    log_every: int = 10  # steps between lines of metrics
    eval_every: int = 200  # steps between evaluations on held-out data
    checkpoint_every: int = 200  # steps between checkpoints
    keep: int = 3  # newest checkpoints kept
    keep_best: int = 1  # checkpoints of lowest held-out loss kept besides
    prompt: str = ""  # of the text printed at the end
    sampling: SamplingParams = SamplingParams()

    def __post_init__(self):
        for name in (
            "batch_size",
            "accumulate",
            "steps",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "keep",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.keep_best < 0:
            raise ValueError(f"keep_best={self.keep_best} is below 0.")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} does not divide into "
                f"accumulate={self.accumulate} equal parts."
            )
        self.batch_controller()

    @property
    def learned(self) -> Objective:
        """The objective: that of the config, or the next token."""
        return NextToken(self.model) if self.objective is None else self.objective

    def batch_controller(self) -> BatchController | None:
        """What decides the batch of each step; None where it stays as it is.

        Raises:
            ValueError: a batch of one part, or as of `BatchGrowth.build`.
        """
        if self.growth is None:
            return None
        if self.accumulate < 2:
            raise ValueError(
                "growth compares the gradients of a batch's parts, and "
                f"accumulate={self.accumulate} leaves one; set accumulate to 2 or more."
            )
        return self.growth.build(self.batch_size, self.batch_size // self.accumulate)
