"""Mamba: a selective state space model.

Each of E channels keeps N decaying sums of its inputs. The time step dt of a token,
what it adds to them (B) and what it reads from them (C) depend on the token itself, so
the layer can store or ignore the token, and keep or forget what it has stored:

    x_t = silu(conv(u W_x)_t + bias),   z_t = u_t W_z
    (r_t, B_t, C_t) = x_t W_select,   dt_t = softplus(r_t W_dt + b_dt)
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T             A = -exp(A_log)  [E, N]
    y_t = (h_t C_t + D x_t) * silu(z_t) W_out

The rates A of every channel are initialised to -1, ..., -N (S4D-real), and dt is
initialised log-uniformly in [0.001, 0.1].

Reference: Gu and Dao, Mamba, arXiv 2312.00752, section 3 and figure 3.

Differs from the authors' code in:
1. the projections to x and z are two matrices, so that sharding channels over devices
   shards both without moving data;
2. dt's projection and softplus are float32 whatever the dtype of the activations;
3. the short convolution stops at document borders in training as in decoding.

Dimension key: B batch, T time, E channels, N states a channel, R rank of dt.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.nn import initializers
from jaxtyping import Array, Float, Int

import pallas_kernels
from jaxlab.layers import contract, convolution_step, short_convolution
from jaxlab.layers.decay import decay_rate
from jaxlab.layers.initial import inverse_softplus_of_time_step, uniform
from jaxlab.mixers.sizes import check_sizes
from jaxlab.params import ParamSpec, constrain, linear, value


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a Mamba layer."""

    width: int  # the model's width
    expand: int = 2  # channels E over the width
    n_states: int = 16  # N, states a channel
    dt_rank: int | None = None  # rank of dt's projection; None: ceil(width / 16)
    convolution: int = 4  # taps of the short convolution
    chunk_size: int | None = None  # tokens in a chunk; None: the kernel's choice
    implementation: str | None = None  # kernel to use; None: the best available

    may_differ: ClassVar[tuple[str, ...]] = ("chunk_size", "implementation")

    def __post_init__(self):
        check_sizes(
            self, "width", "expand", "n_states", "dt_rank", "convolution", "chunk_size"
        )

    @property
    def E(self) -> int:
        return self.expand * self.width

    @property
    def R(self) -> int:
        return self.dt_rank or -(-self.width // 16)


def spec(cfg: Config) -> dict[str, ParamSpec]:
    """The parameters of the layer."""
    E, N, R = cfg.E, cfg.n_states, cfg.R
    taps = uniform(-(cfg.convolution**-0.5), cfg.convolution**-0.5)
    return {
        "w_x": ParamSpec((cfg.width, E), ("width", "hidden")),
        "w_z": ParamSpec((cfg.width, E), ("width", "hidden")),
        "conv": ParamSpec((cfg.convolution, E), (None, "hidden"), taps, "convolution"),
        "conv_bias": ParamSpec((E,), ("hidden",), taps, "bias"),
        "w_select": ParamSpec((E, R + 2 * N), ("hidden", None)),  # for r, B and C
        "w_dt": ParamSpec((R, E), (None, "hidden"), uniform(-(R**-0.5), R**-0.5)),
        "dt_bias": ParamSpec((E,), ("hidden",), inverse_softplus_of_time_step, "decay"),
        "a_log": ParamSpec((E, N), ("hidden", None), _log_of_one_to_n, "decay"),
        "d": ParamSpec((E,), ("hidden",), initializers.ones, "scale"),
        "w_out": ParamSpec((E, cfg.width), ("hidden", "width")),
    }


def _log_of_one_to_n(key, shape, dtype):
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)


@struct.dataclass
class MambaState:
    """The state of a layer after a token.

    Attributes:
        memory: float32 ``[B, E, N]``, the states h.
        conv: the latest inputs of the convolution, ``[B, taps - 1, E]``.
    """

    memory: Float[Array, "B E N"]
    conv: Float[Array, "B W-1 E"]


def init_state(
    cfg: Config, batch: int, max_length: int | None = None, dtype: Any = jnp.float32
) -> MambaState:
    """The state before the first token; `max_length` has no effect."""
    return MambaState(
        memory=jnp.zeros((batch, cfg.E, cfg.n_states), jnp.float32),
        conv=jnp.zeros((batch, cfg.convolution - 1, cfg.E), dtype),
    )


def _row(v: Array, x: Array) -> Array:
    """Reshape v [E] to as many axes as x [..., E]."""
    return v.reshape((1,) * (x.ndim - 1) + (-1,))


def _activate(params, convolved):
    """silu(convolved + bias)."""
    bias = value(params["conv_bias"]).astype(convolved.dtype)
    return jax.nn.silu(convolved + _row(bias, convolved))


def _select(params, x, cfg: Config):
    """dt ``[..., E]`` in float32, B and C ``[..., N]``."""
    ends = (cfg.R, cfg.R + cfg.n_states)
    r, B, C = jnp.split(linear(x, params["w_select"]), ends, axis=-1)
    dt = linear(r.astype(jnp.float32), params["w_dt"])
    bias = value(params["dt_bias"]).astype(jnp.float32)
    return jax.nn.softplus(dt + _row(bias, dt)), B, C


def _rates(params):
    """A and D, float32."""
    return -decay_rate(params["a_log"]), value(params["d"]).astype(jnp.float32)


@contract.forward
def forward(
    params: Any,
    x: Float[Array, "B T width"],
    cfg: Config,
    *,
    state: MambaState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T width"], MambaState | None]:
    """Scan over whole sequences; see `jaxlab.mixers` for the contract."""
    z = linear(x, params["w_z"])
    tail = None if state is None else state.conv
    convolved, tail = short_convolution(
        linear(x, params["w_x"]), value(params["conv"]), tail, segment_ids
    )
    x_BTE = constrain(_activate(params, convolved), "batch", "time", "hidden")
    dt_BTE, B_BTN, C_BTN = _select(params, x_BTE, cfg)
    A_EN, D_E = _rates(params)
    y_BTE, memory = pallas_kernels.selective_scan(
        x_BTE,
        dt_BTE,
        A_EN,
        B_BTN,
        C_BTN,
        D_E,
        initial_state=None if state is None else state.memory,
        segment_ids=segment_ids,
        chunk_size=cfg.chunk_size,
        implementation=cfg.implementation,
    )
    y = linear(y_BTE * jax.nn.silu(z), params["w_out"])
    return y, None if state is None else MambaState(memory, tail)


@contract.step
def step(
    params: Any, x: Float[Array, "B width"], cfg: Config, state: MambaState
) -> tuple[Float[Array, "B width"], MambaState]:
    """Compute one token by the recurrence, at a cost independent of the position."""
    z = linear(x, params["w_z"])
    convolved, tail = convolution_step(
        linear(x, params["w_x"]), value(params["conv"]), state.conv
    )
    x_BE = _activate(params, convolved)
    dt_BE, B_BN, C_BN = _select(params, x_BE, cfg)
    A_EN, D_E = _rates(params)
    y_BTE, memory = pallas_kernels.selective_scan(
        x_BE[:, None],
        dt_BE[:, None],
        A_EN,
        B_BN[:, None],
        C_BN[:, None],
        D_E,
        initial_state=state.memory,
        implementation=cfg.implementation,
    )
    y = linear(y_BTE[:, 0] * jax.nn.silu(z), params["w_out"])
    return y, MambaState(memory, tail)
