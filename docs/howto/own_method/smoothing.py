"""A method of your own in one file: a mixer, a kind of weight, an objective, a task.

The mixer is a moving average of each channel, after a projection:

    h_t = e^{-dt} h_{t-1} + dt (x_t W_in),      y_t = h_t W_out,      dt = softplus(b)

The run below fits it to pairs of sequences, of noise and the noise smoothed:

    python scripts/train.py docs/howto/own_method/smoothing.py
    python scripts/evaluate.py runs/smoothing \
      --config docs/howto/own_method/smoothing.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.nn import initializers

import pallas_kernels
from jaxlab import params
from jaxlab.layers import contract
from jaxlab.optimizers import LAMB, MKOR, WarmupCosine
from jaxlab.params import ParamSpec, linear, value
from jaxlab.training import TaskData, TrainConfig

# A mixer: Config, spec, init_state, forward, step -------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Size of a moving average."""

    width: int  # the model's width


def spec(cfg: Config):
    return {
        "w_in": ParamSpec((cfg.width, cfg.width), ("width", "heads")),
        "w_out": ParamSpec((cfg.width, cfg.width), ("heads", "width")),
        "dt_bias": ParamSpec((cfg.width,), ("heads",), initializers.zeros, "decay"),
    }


@struct.dataclass
class State:
    average: jax.Array  # float32 [B, width, 1]


def init_state(cfg: Config, batch, max_length=None, dtype=jnp.float32):
    return State(jnp.zeros((batch, cfg.width, 1), jnp.float32))


@contract.forward
def forward(weights, x, cfg: Config, *, state=None, segment_ids=None):
    dt = jax.nn.softplus(value(weights["dt_bias"]))[None, None].astype(x.dtype)
    one = jnp.ones((*x.shape[:2], 1), x.dtype)
    h, average = pallas_kernels.selective_scan(
        linear(x, weights["w_in"]),
        jnp.broadcast_to(dt, x.shape),
        -jnp.ones((cfg.width, 1)),
        one,
        one,
        initial_state=None if state is None else state.average,
        segment_ids=segment_ids,
    )
    return linear(h, weights["w_out"]), None if state is None else State(average)


@contract.step
def step(weights, x, cfg: Config, state):
    y, state = forward(weights, x[:, None], cfg, state=state)
    return y[:, 0], state


# A kind of weight ---------------------------------------------------------------------


@struct.dataclass
class UnitColumns(params.Leaf):
    """A weight whose columns have length one, whatever those of `w` have."""

    w: params.Weight

    def linear(self, x):
        lengths = jnp.linalg.norm(value(self.w), axis=0)
        return linear(x, self.w) / lengths.reshape((1,) * (x.ndim - 1) + (-1,))

    def value(self):
        w = value(self.w)
        return w / jnp.linalg.norm(w, axis=0, keepdims=True)


# An objective -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Regression:
    """Squared error of a mixer between two projections."""

    mixer: Config

    def spec(self):
        width = self.mixer.width
        return {
            "w_read": ParamSpec((1, width), (None, "width")),
            "mixer": spec(self.mixer),
            "w_write": ParamSpec((width, 1), ("width", None)),
        }

    def loss(self, params, batch, key):
        del key
        x = linear(batch["inputs"][..., None], params["w_read"])
        x, _ = forward(params["mixer"], x, self.mixer, segment_ids=batch["segment_ids"])
        y = linear(x, UnitColumns(params["w_write"]))[..., 0]
        error, weights = y - batch["targets"], batch["weights"]
        figures = {"absolute_error": jnp.sum(jnp.abs(error) * weights)}
        return jnp.sum(error**2 * weights), jnp.sum(weights), figures


# A task and a run ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """Noise, and the noise smoothed: t_i = 0.8 t_{i-1} + 0.2 x_i."""

    length: int = 32
    vocab_size: int = 0  # no tokens

    def sample(self, rng: np.random.Generator):
        x = rng.standard_normal(self.length, np.float32)
        smooth = np.zeros(self.length, np.float32)
        for i in range(self.length):
            smooth[i] = (0.8 * smooth[i - 1] if i else 0) + 0.2 * x[i]
        return {"inputs": x, "targets": smooth, "weights": np.ones_like(x)}


config = TrainConfig(
    name="smoothing",
    data=TaskData(Smoothing(), eval_rows=64),
    objective=Regression(Config(16)),
    optimizer=MKOR(base=LAMB(1e-2, WarmupCosine(warmup=10))),
    batch_size=16,
    steps=200,
    eval_every=50,
    checkpoint_every=50,
)
