"""A multi-layer perceptron, and three ways to act by its outputs.

A hidden layer is relu(norm(x W + b)) with the norm of layers,

    norm(h) = scale * (h - mean(h)) / sqrt(variance(h) + 1e-6) + shift,

and the last layer is x W + b. Its weights are used through `linear` alone, so they may
be a population's members.

As the policy of an environment, `greedy` and `sample` choose one of `outputs` actions,
and `bounded` makes the vector of one action.

Reference: Sarkar et al., Evolution Strategies at the Hyperscale, arXiv 2511.16652;
the layer is that of Gallici et al., Simplifying Deep Temporal Difference Learning,
arXiv 2407.04811.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from jaxlab.params import ParamSpec, linear


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the network.

    Attributes:
        observation_size: entries of an observation.
        outputs: number of actions, or entries of an action.
        width: of the hidden layers.
        layers: number of hidden layers.
    """

    observation_size: int
    outputs: int
    width: int = 64
    layers: int = 3

    def __post_init__(self):
        for name in ("observation_size", "outputs", "width", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but must be at least 1."
                )


def spec(cfg: Config) -> dict[str, dict[str, ParamSpec]]:
    """Declare the parameters `hidden_0`, `hidden_1`, ... and `last`."""

    def affine(n_in, n_out):
        zeros = ParamSpec((n_out,), (None,), initializers.zeros, "bias")
        return {"w": ParamSpec((n_in, n_out), (None, None)), "b": zeros}

    norm = {
        "scale": ParamSpec((cfg.width,), (None,), initializers.ones, "scale"),
        "shift": ParamSpec((cfg.width,), (None,), initializers.zeros, "bias"),
    }
    sizes = (cfg.observation_size, *(cfg.width,) * cfg.layers)
    hidden = {
        f"hidden_{i}": affine(n_in, n_out) | norm
        for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:], strict=False))
    }
    return hidden | {"last": affine(cfg.width, cfg.outputs)}


def forward(
    params: Any, observation: Float[Array, " observation_size"], cfg: Config
) -> Float[Array, " outputs"]:
    """Return the outputs of the network for one observation."""
    x = observation
    for i in range(cfg.layers):
        layer = params[f"hidden_{i}"]
        h = linear(x, layer["w"]) + layer["b"]
        normal = jax.nn.standardize(h, epsilon=1e-6)
        x = jax.nn.relu(layer["scale"] * normal + layer["shift"])
    return linear(x, params["last"]["w"]) + params["last"]["b"]


def greedy(
    params: Any, observation: Float[Array, " observation_size"], cfg: Config
) -> Int[Array, ""]:
    """Return the action with the largest output, the first of equals."""
    return jnp.argmax(forward(params, observation, cfg)).astype(jnp.int32)


def sample(
    params: Any, observation: Float[Array, " observation_size"], cfg: Config, key: Array
) -> Int[Array, ""]:
    """Draw an action from softmax(outputs)."""
    return jax.random.categorical(key, forward(params, observation, cfg))


def bounded(
    params: Any,
    observation: Float[Array, " observation_size"],
    cfg: Config,
    low: Float[Array, " outputs"],
    high: Float[Array, " outputs"],
) -> Float[Array, " outputs"]:
    """Return low + (high - low) (tanh(outputs) + 1) / 2."""
    low, high = jnp.asarray(low), jnp.asarray(high)
    share = (jnp.tanh(forward(params, observation, cfg)) + 1) / 2
    return low + (high - low) * share
