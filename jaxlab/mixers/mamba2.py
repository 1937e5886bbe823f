"""Mamba-2: state space duality (SSD), a state space model with one decay a head.

Each head keeps a matrix of N states by P channels. The time step dt of a token, what it
adds to the states (B) and what it reads from them (C) depend on the token:

    z, x, B, C, dt = projections of u          dt = softplus(dt + bias)
    x, B, C  = silu(conv(x, B, C) + bias)
    h_t      = exp(dt_t A) h_{t-1} + B_t (dt_t x_t)^T,      A = -exp(A_log) < 0
    y_t      = h_t^T C_t + D x_t
    out      = norm(y_t * silu(z_t)) W_out

This is linear attention with q = C, k = B, v = dt x and log decay g = dt A, whose
parallel form is in `pallas_kernels.gated_linear_attention`. Heads share B and C in
groups, as queries share keys in multi-value attention.

Reference: Dao and Gu, Transformers are SSMs, arXiv 2405.21060, sections 6 and 7.

Differs from the authors' code in:
1. z, x, B, C and dt each have their own matrix, and x, B and C their own convolution,
   rather than parts of one, so that sharding heads over devices moves no data;
2. the short convolution stops at document borders in training as in decoding.

Dimension key: B batch, T time, H heads, P channels a head, N states, G groups.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.nn import initializers
from jaxtyping import Array, Float, Int

import pallas_kernels
from jaxlab.layers import (
    contract,
    convolution_step,
    rms_norm,
    short_convolution,
)
from jaxlab.layers.decay import decay_rate
from jaxlab.layers.initial import (
    inverse_softplus_of_time_step,
    log_of_uniform,
    uniform,
)
from jaxlab.mixers.sizes import check_sizes
from jaxlab.params import ParamSpec, constrain, linear, value

CONVOLVED = ("x", "b", "c")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a Mamba-2 layer."""

    width: int  # the model's width
    expand: int = 2  # channels of all heads over the width
    head_size: int = 64  # P, channels a head
    n_states: int = 128  # N
    n_groups: int = 1  # groups of heads that share B and C
    convolution: int = 4  # taps of the short convolutions on x, B and C
    chunk_size: int | None = None  # tokens in a chunk; None: the kernel's choice
    implementation: str | None = None  # kernel to use; None: the best available

    may_differ: ClassVar[tuple[str, ...]] = ("chunk_size", "implementation")

    def __post_init__(self):
        check_sizes(
            self,
            "width",
            "expand",
            "head_size",
            "n_states",
            "n_groups",
            "convolution",
            "chunk_size",
        )
        if self.channels % self.head_size:
            raise ValueError(
                f"expand * width = {self.channels} channels are not divisible by "
                f"head_size={self.head_size}; choose a size that divides them."
            )
        if self.H % self.n_groups:
            raise ValueError(
                f"{self.H} heads (expand * width / head_size) are not divisible into "
                f"n_groups={self.n_groups} equal groups; choose a divisor of {self.H}."
            )

    @property
    def channels(self) -> int:
        return self.expand * self.width

    @property
    def H(self) -> int:
        return self.channels // self.head_size


def spec(cfg: Config) -> dict[str, ParamSpec]:
    """The parameters of the layer."""
    inner, shared = cfg.channels, cfg.n_groups * cfg.n_states
    tap = uniform(-(cfg.convolution**-0.5), cfg.convolution**-0.5)
    specs = {
        "w_z": ParamSpec((cfg.width, inner), ("width", "heads")),
        "w_dt": ParamSpec((cfg.width, cfg.H), ("width", "heads")),
        "dt_bias": ParamSpec(
            (cfg.H,), ("heads",), inverse_softplus_of_time_step, "decay"
        ),
        "a_log": ParamSpec((cfg.H,), ("heads",), log_of_uniform(1, 16), "decay"),
        "d": ParamSpec((cfg.H,), ("heads",), initializers.ones, "scale"),
        "norm": ParamSpec((inner,), ("heads",), initializers.ones, "scale"),
        "w_out": ParamSpec((inner, cfg.width), ("heads", "width")),
    }
    # B and C serve all heads of a group, so every device has all of them.
    for name, size, axis in (
        ("x", inner, "heads"),
        ("b", shared, None),
        ("c", shared, None),
    ):
        taps = (cfg.convolution, size)
        specs[f"w_{name}"] = ParamSpec((cfg.width, size), ("width", axis))
        specs[f"conv_{name}"] = ParamSpec(taps, (None, axis), tap, "convolution")
        specs[f"conv_bias_{name}"] = ParamSpec((size,), (axis,), tap, "bias")
    return specs


@struct.dataclass
class Mamba2State:
    """The state of a layer after a token.

    Attributes:
        memory: float32 ``[B, H, N, P]``, the states h.
        conv_x, conv_b, conv_c: the latest inputs of the convolutions,
            ``[B, taps - 1, channels]``.
    """

    memory: Float[Array, "B H N P"]
    conv_x: Float[Array, "B W-1 HP"]
    conv_b: Float[Array, "B W-1 GN"]
    conv_c: Float[Array, "B W-1 GN"]


def init_state(
    cfg: Config, batch: int, max_length: int | None = None, dtype: Any = jnp.float32
) -> Mamba2State:
    """The state before the first token; `max_length` has no effect."""

    def tail(channels):
        return jnp.zeros((batch, cfg.convolution - 1, channels), dtype)

    return Mamba2State(
        memory=jnp.zeros((batch, cfg.H, cfg.n_states, cfg.head_size), jnp.float32),
        conv_x=tail(cfg.channels),
        conv_b=tail(cfg.n_groups * cfg.n_states),
        conv_c=tail(cfg.n_groups * cfg.n_states),
    )


def _row(v, x):
    """Reshape v [n] to as many axes as x [..., n], in float32."""
    return value(v).astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))


def _attention_inputs(params, u, convolved, cfg: Config):
    """q = C, k = B, v = dt x and g = dt A by head, and x."""
    rows = u.shape[:-1]
    x, b, c = (
        jax.nn.silu(a + _row(params[f"conv_bias_{name}"], a).astype(a.dtype))
        for name, a in zip(CONVOLVED, convolved, strict=True)
    )
    x = x.reshape(*rows, cfg.H, cfg.head_size)
    b, c = (
        jnp.repeat(
            a.reshape(*rows, cfg.n_groups, cfg.n_states), cfg.H // cfg.n_groups, axis=-2
        )
        for a in (b, c)
    )
    dt = linear(u, params["w_dt"]).astype(jnp.float32)
    dt = jax.nn.softplus(dt + _row(params["dt_bias"], dt))
    g = -_row(decay_rate(params["a_log"]), dt) * dt
    v = (dt[..., None] * x.astype(jnp.float32)).astype(x.dtype)
    return c, b, v, g, x


def _output(params, u, y, x, cfg: Config):
    """Add D x, gate, normalise each group of heads, project."""
    skip = _row(params["d"], x[..., 0])[..., None] * x.astype(jnp.float32)
    y = (y.astype(jnp.float32) + skip).reshape(*u.shape[:-1], -1)
    y = y * jax.nn.silu(linear(u, params["w_z"]).astype(jnp.float32))
    groups = y.reshape(*u.shape[:-1], cfg.n_groups, -1)
    y = rms_norm(groups, jnp.ones(groups.shape[-1])).reshape(y.shape)
    return linear((y * _row(params["norm"], y)).astype(u.dtype), params["w_out"])


@contract.forward
def forward(
    params: Any,
    x: Float[Array, "B T width"],
    cfg: Config,
    *,
    state: Mamba2State | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T width"], Mamba2State | None]:
    """Compute the chunked parallel form; see `jaxlab.mixers` for the contract."""
    convolved, tails = [], {}
    for name in CONVOLVED:
        a, tails[f"conv_{name}"] = short_convolution(
            linear(x, params[f"w_{name}"]),
            value(params[f"conv_{name}"]),
            getattr(state, f"conv_{name}", None),
            segment_ids,
        )
        convolved.append(a)
    q, k, v, g, x_heads = _attention_inputs(params, x, convolved, cfg)
    q, k, v = (constrain(a, "batch", "time", "heads", None) for a in (q, k, v))
    y, memory = pallas_kernels.gated_linear_attention(
        q,
        k,
        v,
        g,
        scale=1.0,
        initial_state=None if state is None else state.memory,
        segment_ids=segment_ids,
        chunk_size=cfg.chunk_size,
        implementation=cfg.implementation,
    )
    out = _output(params, x, y, x_heads, cfg)
    return out, None if state is None else Mamba2State(memory, **tails)


@contract.step
def step(
    params: Any, x: Float[Array, "B width"], cfg: Config, state: Mamba2State
) -> tuple[Float[Array, "B width"], Mamba2State]:
    """Compute one token by the recurrence, at a cost independent of the position."""
    convolved, tails = [], {}
    for name in CONVOLVED:
        a, tails[f"conv_{name}"] = convolution_step(
            linear(x, params[f"w_{name}"]),
            value(params[f"conv_{name}"]),
            getattr(state, f"conv_{name}"),
        )
        convolved.append(a)
    q, k, v, g, x_heads = _attention_inputs(params, x, convolved, cfg)
    y, memory = pallas_kernels.gated_linear_attention(
        q[:, None],
        k[:, None],
        v[:, None],
        g[:, None],
        scale=1.0,
        initial_state=state.memory,
        implementation=cfg.implementation,
    )
    return _output(params, x, y[:, 0], x_heads, cfg), Mamba2State(memory, **tails)
