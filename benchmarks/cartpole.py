"""EGGROLL on CartPole-v1: generations until it is solved, and the time of one.

    python -m benchmarks.cartpole [--turns 9]

A population has 512 networks with three hidden layers that act greedily; sigma is 0.05,
and Adam's learning rate 0.01. A member's fitness is the return of one episode, whose
first state the two members of a pair share. After each generation the mean parameters
play 16 other episodes; the task is solved when all of them last 500 steps. The paper's
networks have layers of 256; these are trained until solved only with rank 1.

A generation gets slower as members survive longer. So it is timed in a CartPole without
limits, where all 512 survive for 500 steps, from noise to update and without the
evaluation; the ranks take turns. Writes `results/cartpole.json`.
"""

import math
import time
from functools import partial

import jax
import optax
import tyro

from benchmarks.record import record
from benchmarks.turns import alternate, report, summarise, timed
from jaxlab import params
from jaxlab.environments import CartPole, episode, returns
from jaxlab.evolution import EGGROLL
from jaxlab.models import perceptron

RANKS = {"rank 1": 1, "rank 4": 4, "full": None}
POPULATION = 512
SEEDS = (1, 2, 3, 4, 5)
EPISODES = 16  # in an evaluation
MOST = 100  # generations
SOLVED = {64: tuple(RANKS), 256: ("rank 1",)}  # width: ranks to train until solved


def network(width: int) -> perceptron.Config:
    """A network with three hidden layers."""
    return perceptron.Config(CartPole().observation_size, CartPole().actions, width)


def main(turns: int = 9) -> None:
    """Measure and record.

    Args:
        turns: repetitions of each time measurement.
    """
    solved = {}
    for width, names in SOLVED.items():
        cfg, solved[width] = network(width), {}
        for name in names:
            step, _ = generation(RANKS[name], CartPole(), cfg)
            runs = [solve(step, RANKS[name], seed, cfg) for seed in SEEDS]
            solved[width][name] = runs
            print(width, name, *runs, flush=True)
    endless = CartPole(x_limit=math.inf, angle_limit=math.inf)
    times = {}
    for width in SOLVED:
        functions = {
            name: timed(generation(rank, endless, network(width)))
            for name, rank in RANKS.items()
        }
        times[width] = summarise(alternate(functions, turns), "full")
        report(f"A generation, layers of {width}", times[width])
    path = record(
        "cartpole",
        turns=turns,
        population=POPULATION,
        parameters={w: params.count(perceptron.spec(network(w))) for w in SOLVED},
        evaluation_episodes=EPISODES,
        seeds=SEEDS,
        generations=of_runs(solved, "generations"),
        seconds=of_runs(solved, "seconds"),
        seconds_of="the generations of a run; neither evaluations nor compilation",
        ratio="time of a generation / time with full noise, in the same turn",
        generation=times,
    )
    print(f"Wrote {path}.")


def of_runs(solved: dict, name: str) -> dict:
    """One figure of every run, by width and rank."""
    return {
        width: {rank: [run[name] for run in runs] for rank, runs in by_rank.items()}
        for width, by_rank in solved.items()
    }


def strategy(rank: int | None, cfg: perceptron.Config):
    """EGGROLL with Adam."""
    es = EGGROLL(population=POPULATION, rank=rank, sigma=0.05)
    return es.build(perceptron.spec(cfg), optax.adam(1e-2))


def start(es, seed: int, cfg: perceptron.Config):
    """The state and parameters before the first generation."""
    weights_key, noise_key = jax.random.split(jax.random.key(seed))
    weights = params.init(perceptron.spec(cfg), weights_key)
    return es.init(weights, noise_key), weights


def generation(rank: int | None, environment: CartPole, cfg: perceptron.Config):
    """The compiled program of one generation, and its first arguments."""
    es = strategy(rank, cfg)

    def fitness(weights, key):
        return episode(
            lambda o, _: perceptron.greedy(weights, o, cfg), environment, key
        ).total

    def step(state, weights):
        state, weights, _ = es.step(state, weights, fitness)
        return state, weights

    arguments = start(es, 0, cfg)
    return jax.jit(step).lower(*arguments).compile(), arguments


@partial(jax.jit, static_argnames="cfg")
def evaluate(weights, key, cfg: perceptron.Config):
    """The lowest return of the mean parameters in an evaluation."""

    def greedy(o, _):
        return perceptron.greedy(weights, o, cfg)

    return returns(greedy, CartPole(), key, EPISODES).min()


def solve(step, rank: int | None, seed: int, cfg: perceptron.Config) -> dict:
    """Generations and seconds until every episode of an evaluation has full length.

    Raises:
        RuntimeError: it is not solved within `MOST` generations.
    """
    state, weights = start(strategy(rank, cfg), seed, cfg)
    keys = jax.random.split(jax.random.key(1000 + seed), MOST)
    evaluate(weights, keys[0], cfg).block_until_ready()
    seconds = 0.0
    for number, key in enumerate(keys, 1):
        begin = time.perf_counter()
        state, weights = jax.block_until_ready(step(state, weights))
        seconds += time.perf_counter() - begin
        if evaluate(weights, key, cfg) == CartPole().max_steps:
            return {"generations": number, "seconds": round(seconds, 3)}
    raise RuntimeError(
        f"Rank {rank} and seed {seed}: unsolved after {MOST} generations."
    )


if __name__ == "__main__":
    tyro.cli(main)
