"""A user's mixer in their own file: a decaying sum of the past.

s_t = gamma s_{t-1} + x_t,   y_t = s_t W
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlab.params import ParamSpec, linear


@dataclasses.dataclass(frozen=True)
class Config:
    width: int
    gamma: float = 0.5


def spec(cfg):
    return {"w": ParamSpec((cfg.width, cfg.width), ("width", None))}


def init_state(cfg, batch, max_length=None, dtype=jnp.float32):
    return jnp.zeros((batch, cfg.width))


def forward(params, x, cfg, *, state=None, segment_ids=None):
    def one(s, x):
        y, s = step(params, x, cfg, s)
        return s, y

    start = init_state(cfg, x.shape[0]) if state is None else state
    end, y = jax.lax.scan(one, start, jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(y, 0, 1), None if state is None else end


def step(params, x, cfg, state):
    state = cfg.gamma * state + x
    return linear(state, params["w"]), state
