"""K-FAC of the kfac-jax package, run as a child process.

Reads one JSON request a line and answers with one. It runs in an environment of its
own, because kfac-jax 0.0.8 runs on JAX up to 0.9.1, and imports nothing else of this
project.
"""

import importlib.metadata
import json
import os
import sys
import time
from typing import Any

# XLA inverts several factors at once, one a core; BLAS that splits each of them, too,
# has its threads wait for each other, up to ten times as long on a machine in use.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax
import jax.numpy as jnp
import kfac_jax  # pyright: ignore[reportMissingImports]
import numpy as np


def problem(width, layers, rows):
    """Parameters, and a batch of what another network says of noise."""
    of_params, of_teacher, of_x = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(of_x, (rows, width))
    y = apply(network(of_teacher, width, layers), x)
    return network(of_params, width, layers), (x, y)


def network(key, width, layers):
    """Weights of variance 1 / width, and biases of 0."""
    return [
        (jax.random.normal(k, (width, width)) / width**0.5, jnp.zeros(width))
        for k in jax.random.split(key, layers)
    ]


def apply(params, x):
    """tanh between the layers."""
    for i, (w, b) in enumerate(params):
        x = x @ w + b
        x = jnp.tanh(x) if i + 1 < len(params) else x
    return x


def loss(params, batch):
    """Half the squared error, summed over the outputs; K-FAC has to be told."""
    x, y = batch
    prediction = apply(params, x)
    kfac_jax.register_squared_error_loss(prediction, y, weight=0.5)
    return 0.5 * jnp.sum((prediction - y) ** 2) / len(x)


class SGD:
    """Gradient descent with momentum, the baseline of this environment."""

    def __init__(self, sizes, rate, momentum):
        self.params, self.batch = problem(*sizes)
        self.velocity = jax.tree.map(jnp.zeros_like, self.params)

        def step(params, velocity, batch):
            value, g = jax.value_and_grad(loss)(params, batch)
            velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, g)
            params = jax.tree.map(lambda p, v: p - rate * v, params, velocity)
            return params, velocity, value

        self.compiled = jax.jit(step, donate_argnums=(0, 1))

    def step(self):
        self.params, self.velocity, value = self.compiled(
            self.params, self.velocity, self.batch
        )
        return value


class KFAC:
    """The optimizer as the package has it, with fixed rate, momentum and damping."""

    def __init__(self, sizes, rate, momentum, damping, cholesky, **settings):
        kfac_jax.utils.set_use_cholesky_inversion(cholesky)
        self.params, self.batch = problem(*sizes)
        self.optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(loss), l2_reg=0.0, **settings
        )
        self.key, self.steps = jax.random.key(1), 0
        self.fixed = {
            "learning_rate": jnp.asarray(rate),
            "momentum": jnp.asarray(momentum),
            "damping": jnp.asarray(damping),
        }
        self.state = self.optimizer.init(self.params, self.key, self.batch)

    def step(self):
        self.params, self.state, found = self.optimizer.step(
            self.params,
            self.state,
            self.key,
            batch=self.batch,
            global_step_int=self.steps,  # else each step waits for the one before
            **self.fixed,
        )
        self.steps += 1
        return found["loss"]


class AdaptiveKFAC:
    """K-FAC that finds its rate, momentum and damping, on batches from a file.

    The file has x, perhaps classes y, the rows of each step, and weights w_i and b_i.
    The loss is of pixels x, or of classes.
    """

    def __init__(self, path, layers, initial_damping, cholesky):
        kfac_jax.utils.set_use_cholesky_inversion(cholesky)
        arrays = np.load(path)
        self.params = [
            (jnp.asarray(arrays[f"w_{i}"]), jnp.asarray(arrays[f"b_{i}"]))
            for i in range(layers)
        ]
        x = jnp.asarray(arrays["x"])
        y = jnp.asarray(arrays["y"]) if "y" in arrays else None
        self.rows = arrays["rows"]
        self.batch_of = lambda rows: (x[rows], x[rows] if y is None else y[rows])
        self.optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(of_pixels if y is None else of_classes),
            l2_reg=0.0,
            use_adaptive_learning_rate=True,
            use_adaptive_momentum=True,
            use_adaptive_damping=True,
            initial_damping=initial_damping,
            num_burnin_steps=0,
        )
        self.key, self.steps = jax.random.key(1), 0
        first = self.batch_of(self.rows[0])
        self.state = self.optimizer.init(self.params, self.key, first)

    def step(self):
        self.params, self.state, found = self.optimizer.step(
            self.params,
            self.state,
            self.key,
            batch=self.batch_of(self.rows[self.steps % len(self.rows)]),
            global_step_int=self.steps,
        )
        self.steps += 1
        return found["loss"]

    def save(self, path):
        arrays: Any = {f"w_{i}": w for i, (w, _) in enumerate(self.params)}
        arrays |= {f"b_{i}": b for i, (_, b) in enumerate(self.params)}
        np.savez(path, **arrays)


def of_pixels(params, batch):
    """The binary cross-entropy, summed over the pixels of an image."""
    x, y = batch
    logits = apply(params, x)
    kfac_jax.register_multi_bernoulli_predictive_distribution(logits, y)
    return jnp.sum(jnp.logaddexp(0.0, logits) - y * logits) / len(x)


def of_classes(params, batch):
    """The cross-entropy."""
    x, y = batch
    logits = apply(params, x)
    kfac_jax.register_categorical_predictive_distribution(logits, y)
    right = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)
    return -jnp.mean(right)


class Inverses:
    """Nothing but the damped inverses of all factors, as they are in K-FAC's step."""

    def __init__(self, sizes, damping, **settings):
        trained = KFAC(sizes, damping=damping, **settings)
        trained.step()
        self.factors = [
            [factor.value for factor in block.factors]
            for block in trained.state.estimator_state.blocks_states
        ]

        def invert(factors):
            return [
                kfac_jax.utils.pi_adjusted_kronecker_inverse(*pair, damping=damping)
                for pair in factors
            ]

        self.compiled = jax.jit(invert)

    def step(self):
        return jax.block_until_ready(self.compiled(self.factors))


CONTESTANTS = {
    "SGD": SGD,
    "K-FAC": KFAC,
    "K-FAC of data": AdaptiveKFAC,
    "inverses": Inverses,
}


def main():
    answers, sys.stdout = sys.stdout, sys.stderr  # keep prints out of the answers
    opened = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "open" in request:
            contestant = CONTESTANTS[request["contestant"]]
            opened[request["open"]] = contestant(**request["settings"])
            answer = {}
        elif "run" in request:
            contestant = opened[request["run"]]
            start = time.perf_counter()
            found = [contestant.step() for _ in range(request["steps"])]
            last = jax.block_until_ready(found[-1])
            answer = {"seconds": time.perf_counter() - start}
            if isinstance(last, jax.Array):
                answer["loss"] = float(last)
                answer["mean_loss"] = sum(map(float, found)) / len(found)
        elif "weights" in request:
            opened[request["weights"]].save(request["path"])
            answer = {}
        else:
            names = {"kfac-jax": "kfac-jax", "its jax": "jax", "its jaxlib": "jaxlib"}
            answer = {n: importlib.metadata.version(of) for n, of in names.items()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
