"""EGGROLL on CartPole-v1: generations until it is solved, and the time of one.

    python -m benchmarks.cartpole [--turns 9]

A population of 512 networks of three hidden layers of 64, `greedy`, sigma 0.05 and Adam
at 0.01; a member's fitness is the return of one episode, whose first state a pair
shares. After each generation the mean parameters play 16 episodes that no member saw,
and it is solved where all of them last 500 steps.

A generation gets slower as members live longer. So the time is taken in a CartPole
without limits, where all 512 live for 500 steps, from noise to update, without the
evaluation; ranks take turns. Layers of 256 are those of the paper's networks. Writes
`results/cartpole.json`.
"""

import math
import time

import jax
import optax
import tyro

from benchmarks.delta_rule import alternate, report, summarise, timed
from benchmarks.record import record
from jaxlab import params
from jaxlab.environments import CartPole, episode, returns
from jaxlab.evolution import EGGROLL, policy

RANKS = {"rank 1": 1, "rank 4": 4, "full": None}
SEEDS = (1, 2, 3, 4, 5)
EPISODES = 16  # of an evaluation
MOST = 100  # generations
WIDTHS = (64, 256)  # the first is that of the runs


def network(width: int = WIDTHS[0]) -> policy.Config:
    """Three hidden layers."""
    return policy.Config(CartPole().observation_size, CartPole().actions, width)


CFG = network()


def main(turns: int = 9) -> None:
    """Measure and record.

    Args:
        turns: repeats of every measurement of time.
    """
    solved = {}
    for name, rank in RANKS.items():
        step, _ = generation(rank, CartPole())
        solved[name] = [solve(step, rank, seed) for seed in SEEDS]
        print(name, *solved[name], flush=True)
    endless = CartPole(x_limit=math.inf, angle_limit=math.inf)
    times = {}
    for width in WIDTHS:
        functions = {
            name: timed(generation(rank, endless, network(width)))
            for name, rank in RANKS.items()
        }
        times[width] = summarise(alternate(functions, turns), "full")
        report(f"A generation, layers of {width}", times[width])
    path = record(
        "cartpole",
        turns=turns,
        population=strategy(1).es.population,
        parameters=params.count(policy.spec(CFG)),
        evaluation_episodes=EPISODES,
        seeds=SEEDS,
        generations={
            name: [run["generations"] for run in runs] for name, runs in solved.items()
        },
        seconds={
            name: [run["seconds"] for run in runs] for name, runs in solved.items()
        },
        seconds_of="the generations of a run; neither evaluations nor compilation",
        ratio="time of a generation / time with full noise, in the same turn",
        generation=times,
    )
    print(f"Wrote {path}.")


def strategy(rank: int | None, cfg: policy.Config = CFG):
    """EGGROLL with Adam."""
    es = EGGROLL(population=512, rank=rank, sigma=0.05)
    return es.build(policy.spec(cfg), optax.adam(1e-2))


def start(es, seed: int, cfg: policy.Config = CFG):
    """State and parameters before the first generation."""
    of_weights, of_noise = jax.random.split(jax.random.key(seed))
    weights = params.init(policy.spec(cfg), of_weights)
    return es.init(weights, of_noise), weights


def generation(rank: int | None, environment: CartPole, cfg: policy.Config = CFG):
    """The compiled program of one generation, and its first arguments."""
    es = strategy(rank, cfg)

    def fitness(weights, key):
        return episode(
            lambda o, _: policy.greedy(weights, o, cfg), environment, key
        ).total

    def step(state, weights):
        weights, state, _ = es.step(state, weights, fitness)
        return state, weights

    arguments = start(es, 0, cfg)
    return jax.jit(step).lower(*arguments).compile(), arguments


@jax.jit
def evaluate(weights, key):
    """The worst return of the mean parameters."""
    greedy = lambda o, _: policy.greedy(weights, o, CFG)  # noqa: E731
    return returns(greedy, CartPole(), key, EPISODES).min()


def solve(step, rank: int | None, seed: int) -> dict:
    """Generations and seconds until every episode of an evaluation is full.

    Raises:
        RuntimeError: not within `MOST` generations.
    """
    state, weights = start(strategy(rank), seed)
    keys = jax.random.split(jax.random.key(1000 + seed), MOST)
    evaluate(weights, keys[0]).block_until_ready()
    seconds = 0.0
    for number, key in enumerate(keys, 1):
        begin = time.perf_counter()
        state, weights = jax.block_until_ready(step(state, weights))
        seconds += time.perf_counter() - begin
        if evaluate(weights, key) == CartPole().max_steps:
            return {"generations": number, "seconds": round(seconds, 3)}
    raise RuntimeError(
        f"Rank {rank} and seed {seed}: unsolved after {MOST} generations."
    )


if __name__ == "__main__":
    tyro.cli(main)
