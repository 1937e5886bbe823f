"""The cost of a Mixture-of-Memories layer over that of a Gated DeltaNet layer.

    python -m benchmarks.mom [--turns 9]

With k routed memories and a shared one, a token updates k + 1 memories, each of the
size of the Gated DeltaNet layer's only one. So k + 1 times its cost is the work itself,
and the cost above that is due to routing: sorting and moving rows. Queries, gate and
output projection are computed once per token, which saves some of it. The two layers
take turns, so that other load affects both equally. Writes `results/mom.json`.
"""

import functools

import jax
import jax.numpy as jnp
import tyro

from benchmarks.record import record
from benchmarks.turns import alternate, report, summarise, timed
from jaxlab import params
from jaxlab.mixers import delta_product, mixer_of, mom

T = 4096
SHAPES = {  # batch, width, heads
    "B=1, 4 heads of 64": (1, 256, 4),
    "B=2, 4 heads of 64": (2, 256, 4),
    "B=1, 4 heads of 128": (1, 512, 4),
}


def main(turns: int = 9, only: str = "") -> None:
    """Measure and record.

    Args:
        turns: repetitions of each measurement.
        only: measure only shapes whose name contains this.
    """
    cases = {}
    for name, (batch, width, heads) in SHAPES.items():
        if only not in name:
            continue
        mixture = mom.Config(width, heads)
        single = delta_product.Config(width, heads, n_householders=1, beta_max=1.0)
        layers = {"mom": mixture, "gated_delta_net": single}
        for direction in (forward, forward_and_backward):
            functions = {
                layer: timed(compiled(direction, cfg, batch))
                for layer, cfg in layers.items()
            }
            case = f"{name}, {direction.__name__.replace('_', ' ')}"
            cases[case] = summarise(alternate(functions, turns), "gated_delta_net")
            report(case, cases[case])
    path = record(
        "mom",
        turns=turns,
        tokens=T,
        memories=mixture.n_memories,
        memories_of_a_token=mixture.top_k + 1,
        dtype="float32",
        ratio="time of the layer / time of gated_delta_net, in the same turn",
        cases=cases,
    )
    print(f"Wrote {path}.")


def forward(cfg, weights, x):
    """The layer's output."""
    return mixer_of(cfg).forward(weights, x, cfg)[0]


def forward_and_backward(cfg, weights, x, dy):
    """The output, and the gradients of the parameters and the input."""
    y, pullback = jax.vjp(functools.partial(forward, cfg), weights, x)
    return y, *pullback(dy)


def compiled(direction, cfg, batch: int):
    """The compiled program of one layer, and its arguments."""
    weights = params.init(mixer_of(cfg).spec(cfg), jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (batch, T, cfg.width))
    arguments = (weights, x) if direction is forward else (weights, x, jnp.ones_like(x))
    program = jax.jit(functools.partial(direction, cfg)).lower(*arguments).compile()
    return program, arguments


if __name__ == "__main__":
    tyro.cli(main)
