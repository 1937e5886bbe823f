"""What optimizers are compared on.

A problem is parameters, a loss of a batch, and batches that a key draws.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.nn import initializers

from jaxlab.params import ParamSpec, linear


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something to minimise.

    Attributes:
        specs: of its parameters.
        loss: (params, batch) to a number.
        batch: (key) to a batch; traced, so that steps are one program.
        biases: of MKOR, what names a weight's bias.
        figures: of trained parameters, by name.
    """

    specs: Any
    loss: Callable[[Any, Any], jax.Array]
    batch: Callable[[jax.Array], Any]
    biases: tuple[tuple[str, str], ...]
    figures: Callable[[Any], dict[str, float]]


def perceptron(sizes: tuple[int, ...]) -> dict[str, Any]:
    """Specs of layers x W + b."""
    return {
        f"layer_{i}": {
            "w": ParamSpec((n_in, n_out), (None, None)),
            "b": ParamSpec((n_out,), (None,), initializers.zeros, "bias"),
        }
        for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:], strict=False))
    }


BIAS = ((r"(.*)/w", r"\1/b"),)


def apply(params: Any, x: jax.Array) -> jax.Array:
    """tanh between the layers."""
    for i in range(len(params)):
        layer = params[f"layer_{i}"]
        x = linear(x, layer["w"]) + layer["b"][None]
        x = jnp.tanh(x) if i + 1 < len(params) else x
    return x


# An autoencoder of curves -------------------------------------------------------------

SIDE, IMAGES, POINTS, PEN = 20, 10_000, 60, 0.4
CODE = (SIDE**2, 300, 150, 60, 15, 60, 150, 300, SIDE**2)


def curves(images: int = IMAGES, seed: int = 0) -> np.ndarray:
    """Cubic Bezier curves of random control points, drawn with a soft pen.

    Returns:
        float32 ``[images, SIDE^2]`` in [0, 1].
    """
    rng = np.random.default_rng(seed)
    control = rng.uniform(0.1, 0.9, (images, 4, 2)) * (SIDE - 1)
    t = np.linspace(0, 1, POINTS)
    weights = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    at = np.einsum("ct,icd->itd", weights, control)
    grid = np.stack(np.meshgrid(*[np.arange(SIDE)] * 2, indexing="ij"), -1)
    drawn = np.empty((images, SIDE * SIDE), np.float32)
    for start in range(0, images, 500):
        part = at[start : start + 500]
        far = part[:, None] - grid.reshape(1, -1, 1, 2)
        near = (far**2).sum(-1).min(-1)
        drawn[start : start + 500] = np.exp(-near / (2 * PEN**2))
    return drawn


def autoencoder(batch_size: int = 500) -> Problem:
    """Curves through fifteen numbers, as in the papers on second-order methods.

    The loss is the binary cross-entropy in nats, summed over the pixels of an image.

    Reference: Hinton and Salakhutdinov, Reducing the Dimensionality of Data with Neural
    Networks, Science 2006; Martens, Deep Learning via Hessian-free Optimization, 2010.
    """
    images = jnp.asarray(curves())

    def loss(params, x):
        nats = optax.sigmoid_binary_cross_entropy(apply(params, x), x)
        return nats.sum() / len(x)

    whole = jax.jit(loss)

    def batch(key):
        return images[jax.random.randint(key, (batch_size,), 0, len(images))]

    def figures(params):
        return {"loss": float(whole(params, images))}

    return Problem(perceptron(CODE), loss, batch, BIAS, figures)


PROBLEMS = {"autoencoder": autoencoder}
