"""DeltaProduct, which includes Gated DeltaNet and DeltaNet (one step a token).

A matrix state S maps keys to values. Each token erases and rewrites it along
`n_householders` keys, with one generalised Householder step for each, then reads it:

    S_{t,0} = e^{g_t} S_{t-1}                                     (forget gate)
    S_{t,j} = (I - beta_{tj} k_{tj} k_{tj}^T) S_{t,j-1} + beta_{tj} k_{tj} v_{tj}^T
    o_t     = K^{-1/2} S_{t,n}^T q_t

with unit keys. With beta in [0, 1] a step only erases; with beta up to 2 it reflects,
and products of n reflections make any rotation in n dimensions, which tracking the
state of a group requires.

| config | method |
|---|---|
| ``n_householders=1, forget_gate=False`` | DeltaNet, arXiv 2406.06484 |
| ``n_householders=1, forget_gate=True`` | Gated DeltaNet, arXiv 2412.06464 |
| ``n_householders=n`` | DeltaProduct, arXiv 2502.10297, eq. 5-7 |

Differs from the papers' code in:
1. the channels of keys and values are ordered (head, step, channel), so that sharding
   heads over devices shards the projections without moving data;
2. beta and the gate are float32 whatever the dtype of the activations: in bfloat16 the
   sigmoid rounds to 1 above 6.2 and its gradient vanishes;
3. the short convolution stops at document borders in training as in decoding.

Dimension key: B batch, T time, N steps a token, H heads, K key size, V value size.
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
    gated_output,
    initial,
    l2_normalize,
    short_convolution,
)
from jaxlab.layers.decay import decay_rate
from jaxlab.mixers.sizes import check_heads, check_sizes
from jaxlab.params import ParamSpec, constrain, linear, value

CONVOLUTIONS = ("conv_q", "conv_k", "conv_v")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and variants of a DeltaProduct layer."""

    width: int  # the model's width
    n_heads: int = 4
    key_size: int | None = None  # per head; None: width / n_heads
    value_size: int | None = None  # per head; None: key_size
    n_householders: int = 2  # steps a token
    beta_max: float = 2.0  # 1: erases (eigenvalues in [0, 1]); 2: reflects ([-1, 1])
    forget_gate: bool = True  # scalar decay e^g for each head
    output_gate: bool = True  # silu(x W_gate) on the normalised output
    convolution: int = 4  # taps of the short convolutions on q, k, v; 0: none
    chunk_size: int | None = None  # tokens in a chunk; None: the kernel's choice
    implementation: str | None = None  # kernel to use; None: the best available

    may_differ: ClassVar[tuple[str, ...]] = ("chunk_size", "implementation")

    def __post_init__(self):
        check_sizes(
            self,
            "width",
            "n_heads",
            "key_size",
            "value_size",
            "n_householders",
            "chunk_size",
        )
        check_heads(self, "key_size")
        if not 0 < self.beta_max <= 2:
            raise ValueError(
                f"beta_max={self.beta_max} is outside (0, 2]; above 2 each step "
                "stretches the state, which then grows without bound."
            )
        if self.convolution < 0:
            raise ValueError(
                f"convolution={self.convolution} must be at least 0; 0 turns it off."
            )

    @property
    def K(self) -> int:
        return self.key_size or self.width // self.n_heads

    @property
    def V(self) -> int:
        return self.value_size or self.K


def spec(cfg: Config) -> dict[str, ParamSpec]:
    """The parameters of the layer."""
    H, N, K, V = cfg.n_heads, cfg.n_householders, cfg.K, cfg.V
    specs = {
        "w_q": ParamSpec((cfg.width, H * K), ("width", "heads")),
        "w_k": ParamSpec((cfg.width, H * N * K), ("width", "heads")),
        "w_v": ParamSpec((cfg.width, H * N * V), ("width", "heads")),
        "w_beta": ParamSpec((cfg.width, H * N), ("width", "heads")),
        "norm": ParamSpec((V,), (None,), initializers.ones, "scale"),
        "w_o": ParamSpec((H * V, cfg.width), ("heads", "width")),
    }
    if cfg.convolution:
        bound = cfg.convolution**-0.5

        def taps(channels):
            return ParamSpec(
                (cfg.convolution, channels),
                (None, "heads"),
                initial.uniform(-bound, bound),
                "convolution",
            )

        specs |= {
            "conv_q": taps(H * K),
            "conv_k": taps(H * N * K),
            "conv_v": taps(H * N * V),
        }
    if cfg.forget_gate:
        specs |= {
            "w_decay": ParamSpec((cfg.width, H), ("width", "heads")),
            "a_log": ParamSpec(
                (H,), ("heads",), initial.log_of_uniform(1, 16), "decay"
            ),
            "dt_bias": ParamSpec(
                (H,), ("heads",), initial.inverse_softplus_of_time_step, "decay"
            ),
        }
    if cfg.output_gate:
        specs["w_gate"] = ParamSpec((cfg.width, H * V), ("width", "heads"))
    return specs


@struct.dataclass
class DeltaProductState:
    """The state of a layer after a token.

    Attributes:
        memory: float32 ``[B, H, K, V]``, the matrix S.
        conv_q, conv_k, conv_v: the latest inputs of the convolutions,
            ``[B, taps - 1, channels]``; None without convolutions.
    """

    memory: Float[Array, "B H K V"]
    conv_q: Float[Array, "B W-1 HK"] | None
    conv_k: Float[Array, "B W-1 HNK"] | None
    conv_v: Float[Array, "B W-1 HNV"] | None


def init_state(
    cfg: Config, batch: int, max_length: int | None = None, dtype: Any = jnp.float32
) -> DeltaProductState:
    """The state before the first token; `max_length` has no effect."""
    H, N, K, V = cfg.n_heads, cfg.n_householders, cfg.K, cfg.V

    def tail(channels):
        if not cfg.convolution:
            return None
        return jnp.zeros((batch, cfg.convolution - 1, channels), dtype)

    return DeltaProductState(
        memory=jnp.zeros((batch, H, K, V), jnp.float32),
        conv_q=tail(H * K),
        conv_k=tail(H * N * K),
        conv_v=tail(H * N * V),
    )


def _gates(params, x, cfg: Config):
    """beta ``[..., N, H]`` and g ``[..., H]`` (or None), float32."""
    logits = linear(x, params["w_beta"]).astype(jnp.float32)
    beta_HN = cfg.beta_max * jax.nn.sigmoid(logits).reshape(
        *x.shape[:-1], cfg.n_heads, cfg.n_householders
    )
    beta = jnp.swapaxes(beta_HN, -1, -2)
    if not cfg.forget_gate:
        return beta, None
    row = (1,) * (x.ndim - 1) + (-1,)
    rate = decay_rate(params["a_log"]).reshape(row)
    bias = value(params["dt_bias"]).astype(jnp.float32).reshape(row)
    dt = jax.nn.softplus(linear(x, params["w_decay"]).astype(jnp.float32) + bias)
    return beta, -rate * dt


def _heads(q, k, v, cfg: Config):
    """Split channels (head, step, size); activate; normalise queries and keys."""
    H, N, K, V = cfg.n_heads, cfg.n_householders, cfg.K, cfg.V
    rows = q.shape[:-1]
    q, k, v = jax.nn.silu(q), jax.nn.silu(k), jax.nn.silu(v)
    q = l2_normalize(q.reshape(*rows, H, K))
    k = l2_normalize(k.reshape(*rows, H, N, K))
    v = v.reshape(*rows, H, N, V)
    return q, jnp.swapaxes(k, -2, -3), jnp.swapaxes(v, -2, -3)


@contract.forward
def forward(
    params: Any,
    x: Float[Array, "B T width"],
    cfg: Config,
    *,
    state: DeltaProductState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T width"], DeltaProductState | None]:
    """Compute the chunked parallel form; see `jaxlab.mixers` for the contract."""
    q, k, v = (linear(x, params[name]) for name in ("w_q", "w_k", "w_v"))
    tails = dict.fromkeys(CONVOLUTIONS)
    if cfg.convolution:

        def convolve(a, name):
            return short_convolution(
                a, value(params[name]), getattr(state, name, None), segment_ids
            )

        q, tails["conv_q"] = convolve(q, "conv_q")
        k, tails["conv_k"] = convolve(k, "conv_k")
        v, tails["conv_v"] = convolve(v, "conv_v")
    q, k, v = _heads(q, k, v, cfg)
    beta, g = _gates(params, x, cfg)
    o, memory = pallas_kernels.delta_product(
        constrain(q, "batch", "time", "heads", None),
        constrain(k, "batch", "time", None, "heads", None),
        constrain(v, "batch", "time", None, "heads", None),
        beta,
        g,
        initial_state=None if state is None else state.memory,
        segment_ids=segment_ids,
        chunk_size=cfg.chunk_size,
        implementation=cfg.implementation,
    )
    y = gated_output(params, x, o)
    return y, None if state is None else DeltaProductState(memory, **tails)


@contract.step
def step(
    params: Any, x: Float[Array, "B width"], cfg: Config, state: DeltaProductState
) -> tuple[Float[Array, "B width"], DeltaProductState]:
    """Compute one token by the recurrence, at a cost independent of the position."""
    q, k, v = (linear(x, params[name]) for name in ("w_q", "w_k", "w_v"))
    tails = dict.fromkeys(CONVOLUTIONS)
    if cfg.convolution:

        def convolve(a, name):
            return convolution_step(a, value(params[name]), getattr(state, name))

        q, tails["conv_q"] = convolve(q, "conv_q")
        k, tails["conv_k"] = convolve(k, "conv_k")
        v, tails["conv_v"] = convolve(v, "conv_v")
    q, k, v = _heads(q, k, v, cfg)
    beta, g = _gates(params, x, cfg)
    o, memory = pallas_kernels.delta_product(
        q[:, None],
        k[:, None],
        v[:, None],
        beta[:, None],
        None if g is None else g[:, None],
        initial_state=state.memory,
        implementation=cfg.implementation,
    )
    return gated_output(params, x, o[:, 0]), DeltaProductState(memory, **tails)
