"""K-FAC of the kfac-jax package, run as a child process.

Reads one JSON request per line and answers each with one line. It runs in its own
environment, because kfac-jax 0.0.8 requires a JAX up to 0.9.1, and imports nothing of
this project.
"""

import importlib.metadata
import json
import os
import sys
import time
from typing import Any

# XLA inverts several factors at once, one on each core. If BLAS also splits each of
# them, its threads wait for each other, up to ten times as long under other load.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax
import jax.numpy as jnp
import kfac_jax  # pyright: ignore[reportMissingImports]
import numpy as np


def problem(width, layers, rows):
    """Parameters, and a batch of noise with the outputs of another network for it."""
    params_key, teacher_key, x_key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(x_key, (rows, width))
    y = apply(network(teacher_key, width, layers), x)
    return network(params_key, width, layers), (x, y)


def network(key, width, layers):
    """Weights of variance 1 / width, and biases of 0."""
    return [
        (jax.random.normal(k, (width, width)) / width**0.5, jnp.zeros(width))
        for k in jax.random.split(key, layers)
    ]


def apply(params, x):
    """Apply the network, with tanh between its layers."""
    for i, (w, b) in enumerate(params):
        x = x @ w + b
        x = jnp.tanh(x) if i + 1 < len(params) else x
    return x


def loss(params, batch):
    """Half the squared error, summed over the outputs, registered for K-FAC."""
    x, y = batch
    prediction = apply(params, x)
    kfac_jax.register_squared_error_loss(prediction, y, weight=0.5)
    return 0.5 * jnp.sum((prediction - y) ** 2) / len(x)


class SGD:
    """Gradient descent with momentum, the baseline in this environment."""

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
    """The package's optimizer with fixed rate, momentum and damping."""

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
        self.params, self.state, figures = self.optimizer.step(
            self.params,
            self.state,
            self.key,
            batch=self.batch,
            global_step_int=self.steps,  # else each step waits for the previous one
            **self.fixed,
        )
        self.steps += 1
        return figures["loss"]


class AdaptiveKFAC:
    """K-FAC with adaptive rate, momentum and damping, on batches from a file.

    The file has x, the rows of each step, weights w_i and b_i, and y if there are
    classes. The loss is that of reconstructing the pixels x, or of the classes.
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

        def batch_of(rows):
            return x[rows], x[rows] if y is None else y[rows]

        self.batch_of = batch_of
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
        self.params, self.state, figures = self.optimizer.step(
            self.params,
            self.state,
            self.key,
            batch=self.batch_of(self.rows[self.steps % len(self.rows)]),
            global_step_int=self.steps,
        )
        self.steps += 1
        return figures["loss"]

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
    """The cross-entropy of the classes, averaged over rows."""
    x, y = batch
    logits = apply(params, x)
    kfac_jax.register_categorical_predictive_distribution(logits, y)
    right = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)
    return -jnp.mean(right)


class Inverses:
    """Only the damped inverses of all factors, as K-FAC's step computes them."""

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
            results = [contestant.step() for _ in range(request["steps"])]
            last = jax.block_until_ready(results[-1])
            answer = {"seconds": time.perf_counter() - start}
            if isinstance(last, jax.Array):
                answer["loss"] = float(last)
                answer["mean_loss"] = sum(map(float, results)) / len(results)
        elif "weights" in request:
            opened[request["weights"]].save(request["path"])
            answer = {}
        else:
            names = {"kfac-jax": "kfac-jax", "its jax": "jax", "its jaxlib": "jaxlib"}
            answer = {n: importlib.metadata.version(x) for n, x in names.items()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
