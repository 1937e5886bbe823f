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

# XLA inverts several factors at once, one a core; BLAS that splits each of them, too,
# has its threads wait for each other, up to ten times as long on a machine in use.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax
import jax.numpy as jnp
import kfac_jax  # pyright: ignore[reportMissingImports]


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


CONTESTANTS = {"SGD": SGD, "K-FAC": KFAC, "inverses": Inverses}


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
            for _ in range(request["steps"]):
                last = contestant.step()
            jax.block_until_ready(last)
            answer = {"seconds": time.perf_counter() - start}
            if isinstance(last, jax.Array):
                answer["loss"] = float(last)
        else:
            names = {"kfac-jax": "kfac-jax", "its jax": "jax", "its jaxlib": "jaxlib"}
            answer = {n: importlib.metadata.version(of) for n, of in names.items()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
