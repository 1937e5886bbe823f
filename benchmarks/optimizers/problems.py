"""The problems on which optimizers are compared.

A problem has parameters, a loss of a batch, and batches that are drawn from a key.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.nn import initializers

from jaxlab import data, models
from jaxlab.mixers import attention, delta_product, gla
from jaxlab.models import LMConfig
from jaxlab.optimizers import Schedule, WarmupStableDecay
from jaxlab.params import ParamSpec, linear


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem to minimise.

    Attributes:
        specs: specs of the parameters.
        loss: function of parameters and a batch to a scalar.
        batch: function of a key to a batch; traced, so that steps are one program.
        figures: function of trained parameters to figures by name; learning rates are
            chosen by "loss".
        follow: function of parameters to a held-out loss, to follow a run.
        drawn: for a perceptron, the data to draw from: images, and classes if any.
        rows: for a perceptron, function of a key to the row numbers of a batch.
        biases: MKOR's setting that names the bias of a weight.
        schedule: schedule of the learning rate; constant after a warm-up, so that no
            later step of a run is special.
        clip: largest global norm of the gradient.
    """

    specs: Any
    loss: Callable[[Any, Any], jax.Array]
    batch: Callable[[jax.Array], Any]
    figures: Callable[[Any], dict[str, float]]
    follow: Callable[[Any], jax.Array] | None = None
    drawn: tuple[jax.Array, ...] | None = None
    rows: Callable[[jax.Array], jax.Array] | None = None
    biases: tuple[tuple[str, str], ...] = ()
    schedule: Schedule = WarmupStableDecay(warmup=0, decay=0.0)
    clip: float = math.inf


def perceptron(sizes: tuple[int, ...]) -> dict[str, Any]:
    """The specs of layers x W + b."""
    return {
        f"layer_{i}": {
            "w": ParamSpec((n_in, n_out), (None, None)),
            "b": ParamSpec((n_out,), (None,), initializers.zeros, "bias"),
        }
        for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:], strict=False))
    }


BIAS = ((r"(.*)/w", r"\1/b"),)


def apply(params: Any, x: jax.Array) -> jax.Array:
    """Apply a perceptron, with tanh between its layers."""
    for i in range(len(params)):
        layer = params[f"layer_{i}"]
        x = linear(x, layer["w"]) + layer["b"][None]
        x = jnp.tanh(x) if i + 1 < len(params) else x
    return x


# An autoencoder of curves -------------------------------------------------------------

SIDE, IMAGES, POINTS, PEN = 20, 10_000, 60, 0.4
CODE = (SIDE**2, 300, 150, 60, 15, 60, 150, 300, SIDE**2)


def curves(images: int = IMAGES, seed: int = 0) -> np.ndarray:
    """Draw cubic Bezier curves of random control points with a soft pen.

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
        offsets = part[:, None] - grid.reshape(1, -1, 1, 2)
        nearest = (offsets**2).sum(-1).min(-1)
        drawn[start : start + 500] = np.exp(-nearest / (2 * PEN**2))
    return drawn


def autoencoder(batch_size: int = 500) -> Problem:
    """Encode curves in fifteen numbers, as in the papers on second-order methods.

    The loss is the binary cross-entropy in nats, summed over the pixels of an image.

    Reference: Hinton and Salakhutdinov, Reducing the Dimensionality of Data with Neural
    Networks, Science 2006; Martens, Deep Learning via Hessian-free Optimization, 2010.
    """
    images = jnp.asarray(curves())

    def loss(params, x):
        nats = optax.sigmoid_binary_cross_entropy(apply(params, x), x)
        return nats.sum() / len(x)

    full_loss = jax.jit(loss)

    def rows(key):
        return jax.random.randint(key, (batch_size,), 0, len(images))

    def figures(params):
        return {"loss": float(full_loss(params, images))}

    return Problem(
        perceptron(CODE),
        loss,
        lambda key: images[rows(key)],
        figures,
        drawn=(images,),
        rows=rows,
        biases=BIAS,
    )


# A classifier of digits ---------------------------------------------------------------

CLASSIFIER, HELD_OUT = (64, 128, 128, 10), 360


def digits(batch_size: int = 128) -> Problem:
    """Classify scikit-learn's 1797 images of 8 by 8; a random fifth is held out.

    The loss is the cross-entropy in nats.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "The digits come with scikit-learn; install jaxlab[bench]."
        ) from error
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = jnp.asarray(images[order] / 16, jnp.float32)
    y = jnp.asarray(labels[order], jnp.int32)
    train, held_out = (x[HELD_OUT:], y[HELD_OUT:]), (x[:HELD_OUT], y[:HELD_OUT])

    def loss(params, batch):
        logits = apply(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def rows(key):
        return jax.random.randint(key, (batch_size,), 0, len(train[0]))

    def batch(key):
        chosen = rows(key)
        return train[0][chosen], train[1][chosen]

    @jax.jit
    def follow(params):
        return loss(params, held_out)

    def figures(params):
        right = jnp.argmax(apply(params, held_out[0]), -1) == held_out[1]
        return {
            "loss": float(loss(params, train)),
            "held_out": float(follow(params)),
            "accuracy": float(right.mean()),
        }

    return Problem(
        perceptron(CLASSIFIER),
        loss,
        batch,
        figures,
        follow=follow,
        drawn=train,
        rows=rows,
        biases=BIAS,
    )


# A language model of bytes ------------------------------------------------------------

WIDTH, LAYERS, HEADS, LENGTH = 128, 2, 4, 128
TRAINED = 8_000_000  # tokens, at most
FOLLOWED, SCORED = 32, 256  # held-out rows during a run, and at its end
STDLIB = data.CorpusConfig(directory="runs/data/stdlib")


def language_model(
    mixer: Any, batch_size: int = 8, corpus: data.CorpusConfig = STDLIB
) -> Problem:
    """Predict bytes of Python's standard library with two layers of one mixer.

    Rows are windows at random places; the loss is in nats per byte.
    """
    cfg = LMConfig(width=mixer.width, n_layers=LAYERS, pattern=(mixer,))
    train, held_out = _texts(corpus)

    def loss(params, rows):
        logits = models.forward(params, rows[:, :-1], cfg)[0]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, rows[:, 1:]
        ).mean()

    def batch(key):
        starts = jax.random.randint(key, (batch_size,), 0, len(train) - LENGTH)
        return train[starts[:, None] + jnp.arange(LENGTH + 1)[None]]

    def score(rows):
        starts = np.linspace(0, len(held_out) - LENGTH - 1, rows, dtype=np.int32)
        chosen = held_out[starts[:, None] + np.arange(LENGTH + 1)]
        return jax.jit(lambda params: loss(params, chosen))

    final_loss = score(SCORED)
    return Problem(
        models.spec(cfg),
        loss,
        batch,
        lambda params: {"loss": float(final_loss(params))},
        follow=score(FOLLOWED),
        schedule=WarmupStableDecay(warmup=20, decay=0.0),
        clip=1.0,
    )


@functools.cache
def _texts(config: data.CorpusConfig) -> tuple[jax.Array, jax.Array]:
    """The training tokens and the held-out tokens."""
    data.build(config)
    corpus = data.open_corpus(config.directory)

    def tokens(split):
        documents = corpus.split(split)
        last = min(int(documents.offsets[-1]), TRAINED)
        return jnp.asarray(np.concatenate(documents.read([(0, last)])))

    return tokens("train"), tokens("heldout")


MIXERS = {
    "attention": attention.Config(WIDTH, n_heads=HEADS),
    "gla": gla.Config(WIDTH, n_heads=HEADS),
    "delta_product": delta_product.Config(WIDTH, n_heads=HEADS, n_householders=2),
}

PROBLEMS = {
    "autoencoder": autoencoder,
    "digits": digits,
    **{
        f"bytes_{name}": functools.partial(language_model, mixer)
        for name, mixer in MIXERS.items()
    },
}
