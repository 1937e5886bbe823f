"""A trained language model, tuned to answer questions, by EGGROLL or by GRPO.

Both see only whether an answer is right. What compares them is the number of answers a
step: population x questions of the one, questions x group of the other.
"""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlab import models, params
from jaxlab.evolution import EGGROLL, Strategy
from jaxlab.models import LMConfig
from jaxlab.optimizers import (
    BatchController,
    BatchGrowth,
    Optimizer,
    build_for,
    events,
    reported,
    tapped_by,
)
from jaxlab.rl import (
    GRPO,
    Questions,
    Sums,
    Task,
    ask,
    exact_match_reward,
    likelihood,
    pass_at_k_reward,
)
from jaxlab.training.batches import Numbered, StepBatch, StepBatches
from jaxlab.training.problem import Curve, Problem, Reading
from jaxlab.training.problems.placement import abstract, compiled, placed
from jaxlab.training.problems.policies import ADAM
from jaxlab.training.problems.readings import (
    LOWER_RATE,
    SMALLER_SIGMA,
    read_events,
    read_fitness,
)
from jaxlab.training.restore import load_run
from jaxlab.training.source import TextData
from jaxlab.training.state import TrainState

FITNESS = ("exact_match", "pass_at_k", "likelihood")


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """A model, its questions, and how it is tuned."""

    init_from: str = "runs/tiny"  # the run whose parameters are tuned
    questions: Task = Sums(digits=1, end="")
    method: EGGROLL | GRPO = GRPO()
    optimizer: Optimizer = dataclasses.replace(ADAM, learning_rate=3e-4, clip=1.0)
    questions_a_step: int = 16  # asked of all members, or of each group
    frozen: tuple[str, ...] = ()  # roles, or patterns of paths, that are not tuned
    accumulate: int = 1  # GRPO: parts of the questions, one gradient after the other
    growth: BatchGrowth | None = None  # GRPO: how questions_a_step grows
    fitness: str = "exact_match"  # EGGROLL: one of `FITNESS`, see `jaxlab.rl`
    samples: int = 1  # EGGROLL: answers of a member to a question
    k: int = 1  # how many of these answers pass_at_k takes
    temperature: float = 0.0  # of members' answers; 0 takes the likeliest tokens
    eval_questions: int = 256  # asked for a score, in each split
    model: LMConfig | None = None  # the model of the run `init_from`, filled in
    data: TextData | None = None  # the data of that run, filled in

    def __post_init__(self):
        if self.fitness not in FITNESS:
            raise ValueError(f"fitness={self.fitness!r} is not one of {FITNESS}.")
        for name in ("questions_a_step", "eval_questions", "samples", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not isinstance(self.method, GRPO) and self.accumulate > 1:
            raise ValueError(
                f"accumulate={self.accumulate} divides the gradients of GRPO; EGGROLL "
                "has none, and its members_at_once bounds the memory."
            )
        if self.questions_a_step % self.accumulate:
            raise ValueError(
                f"questions_a_step={self.questions_a_step} does not divide into "
                f"accumulate={self.accumulate} equal parts."
            )
        self._batch_controller()
        if not 1 <= self.k <= self.samples:
            raise ValueError(f"k={self.k} must be from 1 to samples={self.samples}.")
        if self.k > 1 and self.fitness != "pass_at_k":
            raise ValueError(
                f"k={self.k} is of fitness='pass_at_k', not of {self.fitness!r}."
            )
        draws = isinstance(self.method, EGGROLL) and self.fitness != "likelihood"
        if self.samples > 1 and not draws:
            raise ValueError(
                f"samples={self.samples} are of EGGROLL with drawn answers; GRPO has "
                "its group, and a likelihood draws none."
            )
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples={self.samples} at temperature=0 are all the same; set a "
                "temperature above 0, or samples=1."
            )

    def _batch_controller(self) -> BatchController | None:
        if self.growth is None:
            return None
        if not isinstance(self.method, GRPO):
            raise ValueError(
                "growth compares gradients of parts of a batch, which EGGROLL has not; "
                "leave it None."
            )
        if self.method.updates > 1:
            raise ValueError(
                f"growth tests the one gradient of a batch, but updates="
                f"{self.method.updates}; set updates=1."
            )
        return self.growth.build(self.questions_a_step, self.accumulate)

    @property
    def answers_a_step(self) -> int:
        """Answers that a step looks at, by which the two methods are compared."""
        each = (
            self.method.group
            if isinstance(self.method, GRPO)
            else self.method.population * self.samples
        )
        return each * self.questions_a_step

    def resolved(self) -> "FineTuning":
        """With the model and the data of the run that it starts from."""
        cfg = load_run(self.init_from).config
        if not isinstance(getattr(cfg, "data", None), TextData):
            raise ValueError(
                f"{self.init_from} was not trained on text, which questions are."
            )
        if cfg.data.corpus.tokenizer != "bytes":
            raise ValueError(
                f"{self.init_from} has the tokenizer {cfg.data.corpus.tokenizer}, but "
                "questions are asked in bytes; name a run of bytes."
            )
        if self.model is not None and self.model != cfg.model:
            raise ValueError(
                f"model is given and is not that of {self.init_from}; leave it out."
            )
        return dataclasses.replace(self, model=cfg.model, data=cfg.data)

    def _fitness(self, cfg: LMConfig):
        if self.fitness == "likelihood":
            return lambda weights, key, asked: likelihood(weights, asked, cfg)
        reward = exact_match_reward
        if self.fitness == "pass_at_k":
            reward = partial(pass_at_k_reward, k=self.k)
        how = {"samples": self.samples, "temperature": self.temperature}
        return lambda weights, key, asked: reward(weights, asked, key, cfg, **how)

    def open(self, steps: int, seed: int, *, resumes: bool = False) -> Problem:
        """The problem of a run of so many steps."""
        del resumes  # the run that this one starts from is there either way
        mesh = jax.sharding.get_mesh()
        run = load_run(self.init_from, mesh_config=params.MeshConfig(**mesh.shape))
        cfg, weights = run.config.model, run.params
        specs = models.spec(cfg)
        frozen = [(pattern, False) for pattern in self.frozen]
        trainable = params.select(specs, [*frozen, (".*", True)])
        optimizer = build_for(self.optimizer, specs, steps, trainable)
        tapped = tapped_by(self.optimizer, specs, trainable)
        key = jax.random.key(seed)
        batches = StepBatches(
            Numbered(lambda number: self._questions(seed, number)),
            self.questions_a_step,
            self.accumulate,
            self._batch_controller(),
        )
        if isinstance(self.method, GRPO):
            watched = "reward"
            learned = trainable if self.frozen else None
            memory, learn = _by_gradients(
                self.method, cfg, optimizer, self.accumulate, tapped, learned, weights
            )
        else:
            watched = "fitness"
            es = dataclasses.replace(
                self.method, frozen=(*self.method.frozen, *self.frozen)
            )
            strategy = es.build(specs, optimizer, tapped)
            memory, learn = _by_evolution(strategy, self._fitness(cfg), weights, key)

        start = placed(TrainState(jnp.zeros((), jnp.int32), weights, memory))
        sentences = events(memory)
        updates = self.method.updates if isinstance(self.method, GRPO) else None

        @functools.cache
        def update_in_parts(parts: int):
            def update(state: TrainState, questions: Questions, key):
                memory, tuned, figures = learn(
                    parts, state.opt_state, state.params, questions, key
                )
                state = TrainState(state.step + 1, tuned, memory)
                return state, figures | reported(memory)

            return compiled(update, start)

        def step(state: TrainState, taken: StepBatch, key):
            return update_in_parts(taken.parts)(state, taken.batch, key)

        splits = {
            name: ask(self.questions, seed + 1, range(self.eval_questions), split)
            for name, split in (("right", "train"), ("right_held_out", "test"))
        }
        answer = jax.jit(partial(exact_match_reward, key=key, cfg=cfg))

        def score(state: TrainState) -> dict[str, float]:
            return {
                name: float(answer(state.params, asked))
                for name, asked in splits.items()
            }

        def read(step: int, taken: StepBatch, figures: dict[str, Any]) -> Reading:
            reading = read_fitness(step, taken, figures)
            reading = read_events(step, reading, sentences, updates or 1)
            values = reading.values | {"rows": float(taken.rows)}
            grown = [f"a step now asks {taken.rows} questions"] if taken.grown else []
            return reading._replace(
                values=values | batches.read(values),
                messages=[*reading.messages, *grown],
            )

        return Problem(
            abstract=abstract(start),
            init=lambda: start,
            batches=batches,
            step=step,
            score=score,
            read=read,
            headline=(
                f"{self.questions} asked of {self.init_from}, "
                f"{params.count(specs):,} parameters, by {type(self.method).__name__} "
                f"with {self.answers_a_step} answers a step, {steps} steps"
            ),
            watched=watched,
            goal="right",
            greater=True,
            curve=lambda scores: Curve(
                file="scores.png",
                train=watched,
                held_out="right",
                labels=(watched, "right"),
                unit="share of right answers",
            ),
            advice=LOWER_RATE if updates else SMALLER_SIGMA,
        )

    def _questions(self, seed: int, number: int) -> Questions:
        first = number * self.questions_a_step
        return ask(self.questions, seed, range(first, first + self.questions_a_step))


def _by_gradients(
    method: GRPO, cfg: LMConfig, optimizer, accumulate, tapped, trainable, weights
):
    """The first memory of GRPO, and its step by the number of parts."""

    @functools.cache
    def learner(parts: int):
        return method.build(
            cfg, optimizer, accumulate=parts, tapped=tapped, trainable=trainable
        )

    def learn(parts, memory, weights, questions, key):
        return learner(parts).step(memory, weights, questions, key)

    return learner(accumulate).init(weights), learn


def _by_evolution(strategy: Strategy, fitness, weights, key):
    """The first memory of the strategy, and a generation of it."""

    def learn(parts, memory, weights, questions, key):
        del parts, key  # the state of the strategy has a key of its own
        return strategy.step(memory, weights, fitness, questions)

    return strategy.init(weights, key), learn
