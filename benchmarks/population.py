"""The throughput of a population's forward pass over that of plain batched inference.

    python -m benchmarks.population [--width 1024] [--members 1024] [--turns 15]

Each member multiplies one vector by one square matrix. Plain inference multiplies as
many vectors by the same matrix; members add their noise, which is computed either
beforehand (`LowRank` leaves passed to the program) or in the program, from (key,
generation, direction). With full noise each member has its own matrix, so products
cannot be batched. All contestants take turns. The paper measured a GPU at width 8192 in
bfloat16; run `--width 8192 --dtype bfloat16` there. Writes `results/population.json`.
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
        members: size of the population, and rows of the plain batch.
        turns: repetitions of each measurement.
        dtype: dtype of the matrix and the vectors.
        ranks: ranks of the noise.
    """
    key = jax.random.key(0)
    x = jax.random.normal(key, (members, width), dtype)
    w = jax.random.normal(jax.random.key(1), (width, width), dtype)
    programs = {"plain": compiled(linear, x, w)}
    for rank in ranks:
        programs[f"rank {rank}, noise made before"] = made_before(rank, x, w)
        programs[f"rank {rank}, noise made anew"] = made_anew(rank, x, w)
    functions = {name: timed(program) for name, program in programs.items()}
    summary = summarise(alternate(functions, turns), "plain")
    pair = {"plain": functions["plain"], "full": timed(full_noise(x, w))}
    summary["full noise, made anew"] = summarise(alternate(pair, 3), "plain")["full"]
    for case in summary.values():
        low, high = case["ratio"]["quartiles"]
        case["share"] = {
            "median": round(1 / case["ratio"]["median"], 4),
            "quartiles": [round(1 / high, 4), round(1 / low, 4)],
        }
    report(f"{members} members, width {width}", summary)
    path = record(
        "population",
        width=width,
        members=members,
        turns=turns,
        dtype=dtype,
        share="throughput over plain inference's, in the same turn",
        cases=summary,
    )
    print(f"Wrote {path}.")


def compiled(function, *arguments):
    """The compiled program, and its arguments."""
    return jax.jit(function).lower(*arguments).compile(), arguments


def start(es: EGGROLL, w):
    """A strategy for the matrix, and its state."""
    strategy = es.build({"w": ParamSpec(w.shape, (None, None))}, optax.sgd(0.1))
    return strategy, strategy.init({"w": w}, jax.random.key(2))


def forward(w, x):
    """Multiply a member's vector by its matrix."""
    return linear(x, w["w"])


def made_before(rank: int, x, w):
    """The program whose arguments are the members' noise."""
    strategy, state = start(EGGROLL(len(x), rank), w)
    members, axes = strategy.ask(state, {"w": w})
    return compiled(jax.vmap(forward, (axes, 0)), members, x)


def made_anew(rank: int, x, w):
    """The program that draws the members' noise itself."""
    strategy, state = start(EGGROLL(len(x), rank), w)

    def program(x, w, state):
        return strategy.map(forward, state, {"w": w}, x)

    return compiled(program, x, w, state)


def full_noise(x, w):
    """The program with a full matrix for each member, a few of them at a time."""
    strategy, state = start(EGGROLL(len(x), None), w)

    def program(x, w, state):
        def part(numbers):
            members, axes = strategy.ask(state, {"w": w}, numbers)
            return jax.vmap(forward, (axes, 0))(members, x[numbers])

        return jax.lax.map(part, jnp.arange(len(x)).reshape(-1, FULL_AT_ONCE))

    return compiled(program, x, w, state)


if __name__ == "__main__":
    tyro.cli(main)
