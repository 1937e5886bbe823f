"""A user's feed-forward layer with its own loss, such as a router has."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlab.layers import segments
from jaxlab.params import ParamSpec, linear


@dataclasses.dataclass(frozen=True)
class Config:
    width: int


def spec(cfg):
    return {"w": ParamSpec((cfg.width, cfg.width), ("width", None))}


def forward(params, x, cfg):
    return jax.nn.relu(linear(x, params["w"]))


def auxiliary_loss(params, x, cfg, *, segment_ids=None):
    real = jnp.ones(x.shape[:2], bool)
    if segment_ids is not None:
        real = segments.real(segment_ids)
    return jnp.sum(jnp.mean(forward(params, x, cfg) ** 2, axis=-1), where=real)
