"""Throughput of a population's forward pass as a share of plain batched inference.

    python -m benchmarks.population [--width 1024] [--members 1024] [--turns 15]

Each member puts one vector through one square matrix. Plain inference puts as many
vectors through the matrix alone; members add their noise, made before (`LowRank` leaves
handed to the program) or in the program, from (key, generation, direction). Full noise
gives each member a matrix of its own, whose products no batch shares. All take turns.
The paper's figures are of a GPU at width 8192 in bfloat16: `--width 8192 --dtype
bfloat16` there. Writes `results/population.json`.
"""

import jax
import jax.numpy as jnp
import optax
import tyro

from benchmarks.record import record
from benchmarks.turns import alternate, report, summarise, timed
from jaxlab.evolution import EGGROLL
from jaxlab.params import ParamSpec, linear

FULL_AT_ONCE = 16  # matrices of full noise in memory


def main(
    width: int = 1024,
    members: int = 1024,
    turns: int = 15,
    dtype: str = "float32",
    ranks: tuple[int, ...] = (1,),
) -> None:
    """Measure and record.

    Args:
        width: rows and columns of the matrix.
        members: of the population, and rows of the plain batch.
        turns: repeats of every measurement.
        dtype: of the matrix and the vectors.
        ranks: of the noise.
    """
    key = jax.random.key(0)
    x = jax.random.normal(key, (members, width), dtype)
    w = jax.random.normal(jax.random.key(1), (width, width), dtype)
    programs = {"plain": compiled(linear, x, w)}
    for rank in ranks:
        programs[f"rank {rank}, noise made before"] = made_before(rank, x, w)
        programs[f"rank {rank}, noise made anew"] = made_anew(rank, x, w)
    functions = {name: timed(program) for name, program in programs.items()}
    found = summarise(alternate(functions, turns), "plain")
    pair = {"plain": functions["plain"], "full": timed(full_noise(x, w))}
    found["full noise, made anew"] = summarise(alternate(pair, 3), "plain")["full"]
    for each in found.values():
        low, high = each["ratio"]["quartiles"]
        each["share"] = {
            "median": round(1 / each["ratio"]["median"], 4),
            "quartiles": [round(1 / high, 4), round(1 / low, 4)],
        }
    report(f"{members} members, width {width}", found)
    path = record(
        "population",
        width=width,
        members=members,
        turns=turns,
        dtype=dtype,
        share="throughput over plain inference's, in the same turn",
        cases=found,
    )
    print(f"Wrote {path}.")


def compiled(function, *arguments):
    """The compiled program, and its arguments."""
    return jax.jit(function).lower(*arguments).compile(), arguments


def start(es: EGGROLL, w):
    """A strategy for the one matrix, and its state."""
    strategy = es.build({"w": ParamSpec(w.shape, (None, None))}, optax.sgd(0.1))
    return strategy, strategy.init({"w": w}, jax.random.key(2))


def forward(w, x):
    """A member's vector through its matrix."""
    return linear(x, w["w"])


def made_before(rank: int, x, w):
    """Members' factors are arguments."""
    strategy, state = start(EGGROLL(len(x), rank), w)
    members, axes = strategy.ask(state, {"w": w})
    return compiled(jax.vmap(forward, (axes, 0)), members, x)


def made_anew(rank: int, x, w):
    """Members' noise is drawn in the program."""
    strategy, state = start(EGGROLL(len(x), rank), w)

    def program(x, w, state):
        return strategy.map(forward, state, {"w": w}, x)

    return compiled(program, x, w, state)


def full_noise(x, w):
    """A matrix a member, few of them in memory."""
    strategy, state = start(EGGROLL(len(x), None), w)

    def program(x, w, state):
        def part(numbers):
            members, axes = strategy.ask(state, {"w": w}, numbers)
            return jax.vmap(forward, (axes, 0))(members, x[numbers])

        return jax.lax.map(part, jnp.arange(len(x)).reshape(-1, FULL_AT_ONCE))

    return compiled(program, x, w, state)


if __name__ == "__main__":
    tyro.cli(main)
