"""Training by gradients: an objective, an optimizer, and batches of data."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlab import config, params
from jaxlab.checkpoint import Checkpoints
from jaxlab.data import continuation
from jaxlab.inference import SamplingParams, generate
from jaxlab.models import LMConfig
from jaxlab.objectives import NextToken, Objective, heldout_scores
from jaxlab.optimizers import (
    AdamW,
    BatchController,
    BatchGrowth,
    Optimizer,
    build_for,
    events,
    tapped_by,
)
from jaxlab.training.batches import StepBatch, StepBatches
from jaxlab.training.config import RunConfig, may_differ
from jaxlab.training.problem import Curve, Problem, Reading, floats
from jaxlab.training.problems.readings import read_events
from jaxlab.training.source import Source, TaskData, TextData, open_source
from jaxlab.training.state import TrainState, abstract_state, create_state
from jaxlab.training.step import make_train_step
from jaxlab.training.telling import tell


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A training run. `configs/` holds one of these a file.

    With `growth` the batch follows the norm test of AdAdaGrad: it starts with
    `batch_size` rows, and a step with k times as many, k a power of two, accumulates
    the parts of the next k batches of the data, each of ``batch_size // accumulate``
    rows. A test changes the batch from the second step after its own. `steps` and all
    that is counted in steps, such as schedules of learning rates, are updates of the
    parameters, however many rows each takes.
    """

    data: TextData | TaskData = TextData()
    model: LMConfig = LMConfig()
    objective: Any = None  # what is learned; None: the next token, by `model`
    optimizer: Optimizer = AdamW()
    frozen: tuple[str, ...] = ()  # roles, or patterns of paths, that are not trained
    batch_size: int = 32  # rows a step, over all devices
    accumulate: int = 1  # parts of a batch that go through the model one by one
    growth: BatchGrowth | None = None  # how the batch grows, from batch_size on
    init_from: str | None = None  # another run's directory, for first parameters
    keep_best: int = 1  # checkpoints of the best scores kept besides
    prompt: str = ""  # begins the text printed at the end
    sampling: SamplingParams = SamplingParams()

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
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
        """Decides the batch of each step; None where it does not grow.

        Raises:
            ValueError: a batch of one part, or as for `BatchGrowth.build`.
        """
        if self.growth is None:
            return None
        return self.growth.build(self.batch_size, self.accumulate)

    def open(self, *, resumes: bool) -> Problem:
        """The problem; builds the corpus if it is not there."""
        mesh = jax.sharding.get_mesh()
        source = open_source(self.data, self.batch_size, self.seed, resumes=resumes)
        _check_fit(self, source, mesh)
        objective, specs = self.learned, self.learned.spec()
        frozen = [(pattern, False) for pattern in self.frozen]
        trainable = params.select(specs, [*frozen, (".*", True)])
        optimizer = build_for(self.optimizer, specs, self.steps, trainable)
        tapped = tapped_by(self.optimizer, specs, trainable)
        controller = self.batch_controller()
        batches = StepBatches(
            source.train, self.batch_size, self.accumulate, controller
        )
        abstract = abstract_state(specs, optimizer, mesh)

        @functools.cache
        def step_in_parts(parts: int):
            return make_train_step(
                objective,
                optimizer,
                parts,
                tapped,
                trainable if self.frozen else None,
            )

        def step(state: TrainState, taken: StepBatch, key):
            batch = params.place_rows(taken.batch, mesh)
            return step_in_parts(taken.parts)(state, batch, key)

        def score(state: TrainState) -> dict[str, float]:
            scores = heldout_scores(objective, state.params, source.heldout(), mesh)
            return {name: x for name, x in scores.items() if isinstance(x, float)}

        return Problem(
            abstract=abstract,
            init=lambda: _first_state(self, optimizer, mesh),
            batches=batches,
            step=step,
            score=score,
            read=functools.partial(
                _read, batches, events(abstract.opt_state), source.row_length
            ),
            headline=_headline(self, source, mesh),
            watched="loss",
            goal="loss",
            curve=lambda scores: _curve(self, source, scores),
            split="heldout",
            describe=_described,
            sample=functools.partial(_sample, self, source),
            keeps=source.keeps,
            flops_per_token=flops_per_token(specs),
            advice=(
                "Try a lower learning_rate, a longer warmup of its schedule or a "
                "smaller clip of the optimizer; in bfloat16, try "
                "model.compute_dtype='float32'."
            ),
        )


def _read(
    batches: StepBatches,
    sentences: Mapping[str, str],
    row_length: int,
    step: int,
    taken: StepBatch,
    figures: Mapping[str, Any],
) -> Reading:
    """The figures, the optimizer's events, and the batch that the step asks for."""
    reading = read_events(step, floats(step, taken, figures), sentences)
    tokens = taken.rows_seen * row_length
    values = reading.values | {"rows": taken.rows, "tokens": tokens}
    grown = [f"the batch is now {taken.rows} rows"] if taken.grown else []
    return reading._replace(
        values=values | batches.read(values),
        tokens=tokens,
        messages=[*reading.messages, *grown],
    )


def _first_state(cfg: TrainConfig, optimizer, mesh: Mesh) -> TrainState:
    """New parameters, or those that another run ended with."""
    specs = cfg.learned.spec()
    state = create_state(specs, optimizer, mesh, cfg.seed)
    if cfg.init_from is None:
        return state
    other = Checkpoints(
        Path(cfg.init_from) / "checkpoints",
        config=config.to_json(cfg),
        may_differ=may_differ(cfg),
    )
    abstract = abstract_state(specs, optimizer, mesh).params
    step, arrays = other.restore(abstract, subtree="params")
    if jax.process_index() == 0:
        tell(f"Starting from the parameters of {cfg.init_from} at step {step}.\n")
    return dataclasses.replace(state, params=arrays)


def _check_fit(cfg: TrainConfig, source: Source, mesh: Mesh) -> None:
    reads_tokens = cfg.objective is None
    if reads_tokens and source.vocab_size > cfg.model.vocab_size:
        raise ValueError(
            f"The data has {source.vocab_size} token ids but model.vocab_size is "
            f"{cfg.model.vocab_size}; set it to {source.vocab_size} or more."
        )
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if cfg.batch_size % (parts * cfg.accumulate):
        raise ValueError(
            f"batch_size={cfg.batch_size} does not divide over {parts} devices (mesh "
            f"axes data and fsdp) and accumulate={cfg.accumulate} parts; choose a "
            f"multiple of {parts * cfg.accumulate}."
        )
    if source.row_length % mesh.shape["sequence"]:
        raise ValueError(
            f"Rows of {source.row_length} tokens do not divide over the mesh axis "
            f"sequence={mesh.shape['sequence']}."
        )


def flops_per_token(specs: Any) -> float:
    """Operations of a training step a token: 6 a parameter that multiplies.

    Two forward and four backward; the scores of attention and the recurrences of other
    mixers are left out, so utilisation is understated where they matter.
    """
    leaves = jax.tree.leaves(specs)
    roles = {spec.role for spec in leaves}
    # A table beside a head is looked up, and so not multiplied by.
    looked_up = [s for s in leaves if s.role == "embedding" and "head" in roles]
    return 6.0 * (params.count(leaves) - params.count(looked_up))


def _headline(cfg: TrainConfig, source: Source, mesh: Mesh) -> str:
    kind = mesh.devices.flat[0].device_kind
    rows = str(cfg.batch_size)
    if cfg.growth is not None:
        rows += f" to {cfg.growth.largest}"
    return (
        f"{params.count(cfg.learned.spec()):,} parameters, {cfg.steps} steps of "
        f"{rows} x {source.row_length} tokens on {mesh.size} {kind}"
    )


def _described(scores: Mapping[str, float]) -> str:
    if "bits_per_byte" in scores:
        return f"held-out {scores['bits_per_byte']:.3f} bits per byte"
    text = f"held-out loss {scores['loss']:.3f}"
    if "accuracy" in scores:
        text += f", accuracy {scores['accuracy']:.1%}"
    return text


def _curve(cfg: TrainConfig, source: Source, scores: Mapping[str, float]) -> Curve:
    unit = "bits_per_byte" if "bits_per_byte" in scores else "loss"
    in_nats = unit == "loss" and cfg.objective is None
    return Curve(
        file="loss.png",
        train=unit,
        held_out=unit,
        labels=("train", "held-out"),
        unit="loss (nats per target)" if in_nats else unit.replace("_", " "),
        baselines=source.baselines,
    )


def _sample(cfg: TrainConfig, source: Source, state: TrainState) -> str | None:
    """Text after the prompt, where the run learned to write."""
    if source.tokenizer is None or cfg.objective is not None:
        return None
    prompt = source.tokenizer.encode(cfg.prompt)
    tokens = generate(
        state.params,
        jnp.array([[source.tokenizer.separator, *prompt]], jnp.int32),
        cfg.model,
        cfg.sampling,
        vocab_size=source.vocab_size,
    )
    text = continuation(source.tokenizer, prompt, np.asarray(tokens)[0])
    return f"A sample after {cfg.prompt!r}:\n{cfg.prompt}{text}"
