"""The capacity of untrained LaCT fast weights: pairs written in chunks, then read.

    python -m benchmarks.lact_recall [--seeds 5]

Keys are unit vectors along normal draws or along the silu of normal draws, and values
are normal draws, all of size 64. For capacity, all pairs are written in one chunk and
then read; a read is right if the output's cosine with the key's own value is the
largest. For retention, eight chunks of 32 pairs are written and then all are read.
Writes `results/lact_recall.json`.

Reference: Zhang et al., "Test-Time Training Done Right", arXiv 2505.23884.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float

from benchmarks.record import record
from jaxlab.layers import l2_normalize
from jaxlab.mixers.lact.fast_weights import FastWeights, Rule
from jaxlab.mixers.lact.ttt_scan import ttt_scan

SIZE = 64
PAIRS = (16, 64, 128, 256, 512)
CHUNKS, CHUNK = 8, 32

WRITE = {
    "muon": (Rule("muon"), 1e-3),
    "gradient_descent": (Rule("gradient_descent"), 0.1),
}
"""Rule and learning rate; Muon's updates do not depend on the rate."""

RETENTION = {
    "muon post, r=1": (Rule("muon", "post"), 1e-3, 1, None),
    "muon post, r=1, momentum 0.9": (Rule("muon", "post"), 1e-3, 1, 0.9),
    "muon pre, r=1": (Rule("muon", "pre"), 1e-3, 1, None),
    "muon post, r=4": (Rule("muon", "post"), 1e-3, 4, None),
    "muon pre, r=4": (Rule("muon", "pre"), 1e-3, 4, None),
    "gradient_descent post, r=4, momentum 0.9": (
        Rule("gradient_descent", "post"),
        0.1,
        4,
        0.9,
    ),
}
"""Rule, learning rate, hidden size over head size, momentum."""


@functools.partial(
    jax.jit, static_argnames=("pairs", "chunk", "multiple", "rule", "silu_keys")
)
def recall(
    key: Array,
    pairs: int,
    rule: Rule,
    learning_rate: float,
    multiple: int,
    momentum: float | None = None,
    chunk: int | None = None,
    silu_keys: bool = True,
) -> Float[Array, " pairs"]:
    """Write pairs, read them all, and return 1 for each that is right and 0 otherwise.

    Args:
        key: seeds the weights, keys and values.
        pairs: number of pairs.
        rule: the update rule of the fast weights.
        learning_rate: the same for every token and matrix.
        multiple: hidden size over head size.
        momentum: the same for every chunk; None for no momentum.
        chunk: pairs in a chunk; None for all at once.
        silu_keys: whether keys pass through a silu as in the layer, which gives them a
            common mean.
    """
    keys = jax.random.split(key, 5)
    hidden = multiple * SIZE
    initial = FastWeights(
        gate=jax.random.normal(keys[0], (1, SIZE, hidden)) * SIZE**-0.5,
        up=jax.random.normal(keys[1], (1, SIZE, hidden)) * SIZE**-0.5,
        down=jax.random.normal(keys[2], (1, hidden, SIZE)) * hidden**-0.5,
    )
    k, v = (jax.random.normal(key, (1, pairs, 1, SIZE)) for key in keys[3:])
    k = l2_normalize(jax.nn.silu(k) if silu_keys else k)
    o, _ = ttt_scan(
        initial,
        k,
        k,
        v,
        jnp.full((1, pairs, 1, 3), learning_rate),
        None if momentum is None else jnp.full((1, pairs, 1), momentum),
        chunk_size=chunk or pairs,
        rule=rule,
        order="update_all",
    )
    scores = l2_normalize(o[0, :, 0]) @ l2_normalize(v[0, :, 0]).T
    return (jnp.argmax(scores, axis=1) == jnp.arange(pairs)).astype(jnp.float32)


def retention(key: Array, name: str) -> Float[Array, " chunks"]:
    """The accuracy on each chunk, oldest first, for an entry of `RETENTION`."""
    rule, rate, multiple, momentum = RETENTION[name]
    right = recall(
        key,
        CHUNKS * CHUNK,
        rule,
        rate,
        multiple,
        momentum,
        CHUNK,
        silu_keys=False,
    )
    return jnp.mean(right.reshape(CHUNKS, CHUNK), axis=1)


def _over_seeds(score, seeds: int) -> dict:
    """The mean and standard deviation of a score, or of each score in an array."""
    scores = [np.asarray(score(jax.random.key(i)), np.float64) for i in range(seeds)]
    scores = np.stack(scores)
    return {
        "mean": np.round(scores.mean(axis=0), 3).tolist(),
        "deviation": np.round(scores.std(axis=0), 3).tolist(),
    }


def main(seeds: int = 5) -> None:
    """Measure both tables.

    Args:
        seeds: number of draws of weights, keys and values.
    """
    written = [
        {"rule": name, "multiple": multiple, "pairs": pairs}
        | _over_seeds(
            lambda key: recall(key, pairs, rule, rate, multiple).mean(),  # noqa: B023
            seeds,
        )
        for name, (rule, rate) in WRITE.items()
        for multiple in (1, 4)
        for pairs in PAIRS
    ]
    retained = [
        {"name": name} | _over_seeds(lambda key: retention(key, name), seeds)  # noqa: B023
        for name in RETENTION
    ]
    for row in written + retained:
        print(row, flush=True)
    path = record(
        "lact_recall", size=SIZE, seeds=seeds, written=written, retained=retained
    )
    print(f"Wrote {path}")


if __name__ == "__main__":
    tyro.cli(main)
