"""A network that acts in an environment, found by EGGROLL."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlab import params
from jaxlab.environments import Acrobot, Box, CartPole, Pendulum, returns
from jaxlab.evolution import EGGROLL
from jaxlab.models import perceptron
from jaxlab.optimizers import (
    AdamW,
    Optimizer,
    WarmupStableDecay,
    events,
    reported,
    tapped_by,
)
from jaxlab.training.batches import Numbered
from jaxlab.training.problem import Curve, Problem
from jaxlab.training.problems.placement import abstract, compiled, placed
from jaxlab.training.problems.readings import SMALLER_SIGMA, read_events, read_fitness
from jaxlab.training.state import TrainState

ADAM = AdamW(
    learning_rate=1e-2,
    schedule=WarmupStableDecay(warmup=0, decay=0.0),
    weight_decay=0.0,
    b2=0.999,
    clip=1e9,
)
"""Adam at one rate, without a clip."""

ACTIONS = ("greedy", "sample")


@dataclasses.dataclass(frozen=True)
class PolicySearch:
    """An environment, a multi-layer perceptron, and how it is searched."""

    environment: CartPole | Pendulum | Acrobot = CartPole()
    width: int = 64  # of the hidden layers
    layers: int = 3
    actions: str = "greedy"  # of numbered ones: the best, or "sample" of the softmax
    es: EGGROLL = EGGROLL()
    optimizer: Optimizer = ADAM
    episodes: int = 1  # whose mean return is a member's fitness
    eval_episodes: int = 16  # of the mean parameters, a score

    def __post_init__(self):
        if self.actions not in ACTIONS:
            raise ValueError(f"actions={self.actions!r} is not one of {ACTIONS}.")
        for name in ("episodes", "eval_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    def open(self, steps: int, seed: int, *, resumes: bool = False) -> Problem:
        """The problem of a run of so many generations."""
        del resumes  # nothing is read from files
        space = self.environment.actions
        outputs = space.size if isinstance(space, Box) else space
        cfg = perceptron.Config(
            self.environment.observation_size, outputs, self.width, self.layers
        )
        specs = perceptron.spec(cfg)
        of_weights, of_noise, of_scores = jax.random.split(jax.random.key(seed), 3)
        weights = params.init(specs, of_weights)
        optimizer = self.optimizer.build(specs, steps)
        strategy = self.es.build(specs, optimizer, tapped_by(self.optimizer, specs))

        def total(weights, key, episodes):
            def act(observation, key):
                if isinstance(space, Box):
                    bounds = jnp.asarray(space.low), jnp.asarray(space.high)
                    return perceptron.bounded(weights, observation, cfg, *bounds)
                if self.actions == "greedy":
                    return perceptron.greedy(weights, observation, cfg)
                return perceptron.sample(weights, observation, cfg, key)

            return returns(act, self.environment, key, episodes)

        def fitness(weights, key):
            return total(weights, key, self.episodes).mean()

        def generation(state: TrainState):
            es, weights, figures = strategy.step(state.opt_state, state.params, fitness)
            return TrainState(state.step + 1, weights, es), figures | reported(es)

        @jax.jit
        def play(weights):
            return total(weights, of_scores, self.eval_episodes)

        def score(state: TrainState) -> dict[str, float]:
            totals = play(state.params)
            return {"return": float(totals.mean()), "return_worst": float(totals.min())}

        memory = strategy.init(weights, of_noise)
        start = placed(TrainState(jnp.zeros((), jnp.int32), weights, memory))
        update, sentences = compiled(generation, start), events(memory)
        return Problem(
            abstract=abstract(start),
            init=lambda: start,
            batches=Numbered(lambda number: None),  # episodes make their own data
            step=lambda state, _, key: update(state),
            score=score,
            read=lambda step, batch, figures: read_events(
                step, read_fitness(step, batch, figures), sentences
            ),
            headline=(
                f"{type(self.environment).__name__} by a population of "
                f"{self.es.population}, {params.count(specs):,} parameters, {steps} "
                "steps"
            ),
            watched="fitness",
            goal="return",
            greater=True,
            curve=lambda scores: Curve(
                file="scores.png",
                train="fitness",
                held_out="return",
                labels=("fitness", "return"),
                unit="return of an episode",
            ),
            advice=SMALLER_SIGMA,
        )
