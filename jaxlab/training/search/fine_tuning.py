"""A trained language model, tuned to answer questions, by EGGROLL or by GRPO.

Both see only whether an answer is right. What compares them is the number of answers a
step: population x questions of the one, questions x group of the other.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jaxlab import models, params
from jaxlab.evolution import EGGROLL, Strategy
from jaxlab.models import LMConfig
from jaxlab.optimizers import Optimizer, tapped_by
from jaxlab.rl import (
    GRPO,
    Copy,
    Questions,
    Sums,
    ask,
    exact_match_reward,
    likelihood,
    pass_at_k_reward,
)
from jaxlab.training.restore import load_run
from jaxlab.training.search.policies import ADAM
from jaxlab.training.search.problem import Problem, compiled
from jaxlab.training.source import TextData
from jaxlab.training.state import TrainState

FITNESS = ("exact_match", "pass_at_k", "likelihood")


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """A model, its questions, and how it is tuned."""

    init_from: str = "runs/tiny"  # the run whose parameters are tuned
    questions: Sums | Copy = Sums(digits=1, end="")
    method: EGGROLL | GRPO = GRPO()
    optimizer: Optimizer = dataclasses.replace(ADAM, learning_rate=3e-4, clip=1.0)
    questions_a_step: int = 16  # asked of all members, or of each group
    accumulate: int = 1  # of GRPO: parts of the questions, one gradient after the other
    fitness: str = "exact_match"  # of EGGROLL: one of `FITNESS`, of `jaxlab.rl`
    samples: int = 1  # answers of a member to a question
    k: int = 1  # of them that pass_at_k takes
    temperature: float = 0.0  # of members' answers; 0 takes the likeliest tokens
    eval_questions: int = 256  # a score, of each split
    model: LMConfig | None = None  # of the run `init_from`, filled in
    data: TextData | None = None  # likewise

    def __post_init__(self):
        if self.fitness not in FITNESS:
            raise ValueError(f"fitness={self.fitness!r} is not one of {FITNESS}.")
        for name in ("questions_a_step", "eval_questions", "samples", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
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

    @property
    def answers_a_step(self) -> int:
        """What the two methods have in common."""
        each = (
            self.method.group
            if isinstance(self.method, GRPO)
            else self.method.population * self.samples
        )
        return each * self.questions_a_step

    def resolved(self) -> "FineTuning":
        """With the model and the data of the run that it starts from."""
        cfg = load_run(self.init_from).config
        if not isinstance(cfg.data, TextData):
            raise ValueError(f"{self.init_from} was trained on a task, not on text.")
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

    def open(self, steps: int, seed: int) -> Problem:
        """The problem of a run of so many steps."""
        mesh = jax.sharding.get_mesh()
        run = load_run(self.init_from, mesh_config=params.MeshConfig(**mesh.shape))
        cfg, weights = run.config.model, run.params
        optimizer = self.optimizer.build(models.spec(cfg), steps)
        key = jax.random.key(seed)

        def questions(number: int) -> Questions:
            first = number * self.questions_a_step
            return ask(
                self.questions, seed, range(first, first + self.questions_a_step)
            )

        method = self.method
        if isinstance(method, GRPO):
            learner = method.build(
                cfg,
                optimizer,
                accumulate=self.accumulate,
                tapped=tapped_by(self.optimizer, models.spec(cfg)),
            )
            train = "reward"
            memory = learner.init(weights)
            learn = learner.step
        else:
            strategy, train = method.build(models.spec(cfg), optimizer), "fitness"
            memory = strategy.init(weights, key)
            learn = partial(_generation, strategy, self._fitness(cfg))

        def update(state: TrainState, asked: Questions):
            own = jax.random.fold_in(key, state.step)
            memory, tuned, figures = learn(state.opt_state, state.params, asked, own)
            return TrainState(state.step + 1, tuned, memory), figures

        start = TrainState(jnp.zeros((), jnp.int32), weights, memory)
        update, start = compiled(update, start)
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

        return Problem(
            start,
            lambda state, number: update(state, questions(number)),
            score,
            f"{self.questions} asked of {self.init_from}, "
            f"{params.count(models.spec(cfg)):,} parameters, by "
            f"{type(self.method).__name__} with {self.answers_a_step} answers a step",
            *(train, "right", "share of right answers"),
        )


def _generation(strategy: Strategy, fitness, state, params, asked, _):
    """As a learner's step; the state of the strategy has the key."""
    return strategy.step(state, params, fitness, asked)
