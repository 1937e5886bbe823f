"""Gated Linear Attention: each key channel has a forget gate computed from the input.

    alpha_t = sigmoid(x_t W_in W_out + b)^{1/tau}                     [H, K]
    S_t     = diag(alpha_t) S_{t-1} + k_t v_t^T
    o_t     = S_t^T q_t
    y_t     = (silu(x_t W_gate) * norm(o_t)) W_o

The root tau = 16 keeps the gates near one, so the memory forgets slowly. The parallel
form is in `pallas_kernels.gated_linear_attention`.

Reference: Yang et al., Gated Linear Attention Transformers, arXiv 2312.06635, section
4.4 (eq. 7-9 for the gates).

Differs from the paper in:
1. queries are scaled by K^{-1/2}, which the norm cancels;
2. the norm is RMSNorm and the output gate has no bias, as in the authors' later code;
3. gates are float32 whatever the dtype of the activations.

Dimension key: B batch, T time, H heads, K key size, V value size.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.nn import initializers
from jaxtyping import Array, Float, Int

import pallas_kernels
from jaxlab.layers import contract, gated_output
from jaxlab.mixers.sizes import check_heads, check_sizes
from jaxlab.params import ParamSpec, constrain, linear, value


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a Gated Linear Attention layer."""

    width: int  # the model's width
    n_heads: int = 4
    key_size: int | None = None  # per head; None: half the value size
    value_size: int | None = None  # per head; None: width / n_heads
    gate_rank: int = 16  # rank of the forget gate's projection
    gate_root: float = 16.0  # tau; larger values forget more slowly
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
            "gate_rank",
            "chunk_size",
        )
        check_heads(self, "value_size")
        if self.key_size is None and self.V % 2:
            raise ValueError(
                f"The value size {self.V} is odd, so the key size cannot be half of "
                "it; set key_size."
            )
        if self.gate_root <= 0:
            raise ValueError(f"gate_root={self.gate_root} must be above 0.")

    @property
    def V(self) -> int:
        return self.value_size or self.width // self.n_heads

    @property
    def K(self) -> int:
        return self.key_size or self.V // 2


def spec(cfg: Config) -> dict[str, ParamSpec]:
    """The parameters of the layer."""
    keys, values = cfg.n_heads * cfg.K, cfg.n_heads * cfg.V
    return {
        "w_q": ParamSpec((cfg.width, keys), ("width", "heads")),
        "w_k": ParamSpec((cfg.width, keys), ("width", "heads")),
        "w_v": ParamSpec((cfg.width, values), ("width", "heads")),
        "w_decay_in": ParamSpec((cfg.width, cfg.gate_rank), ("width", None)),
        "w_decay_out": ParamSpec((cfg.gate_rank, keys), (None, "heads")),
        "decay_bias": ParamSpec((keys,), ("heads",), initializers.zeros, "decay"),
        "norm": ParamSpec((cfg.V,), (None,), initializers.ones, "scale"),
        "w_gate": ParamSpec((cfg.width, values), ("width", "heads")),
        "w_o": ParamSpec((values, cfg.width), ("heads", "width")),
    }


@struct.dataclass
class GLAState:
    """The state of a layer after a token.

    Attributes:
        memory: float32 ``[B, H, K, V]``, the matrix S.
    """

    memory: Float[Array, "B H K V"]


def init_state(
    cfg: Config, batch: int, max_length: int | None = None, dtype: Any = jnp.float32
) -> GLAState:
    """The state before the first token; `max_length` and `dtype` have no effect."""
    return GLAState(jnp.zeros((batch, cfg.n_heads, cfg.K, cfg.V), jnp.float32))


def _project(params, x, cfg: Config):
    """q, k ``[..., H, K]``, v ``[..., H, V]`` and the float32 log gates."""
    rows = x.shape[:-1]
    q = linear(x, params["w_q"]).reshape(*rows, cfg.n_heads, cfg.K)
    k = linear(x, params["w_k"]).reshape(*rows, cfg.n_heads, cfg.K)
    v = linear(x, params["w_v"]).reshape(*rows, cfg.n_heads, cfg.V)
    x = x.astype(jnp.float32)
    logits = linear(linear(x, params["w_decay_in"]), params["w_decay_out"])
    bias = value(params["decay_bias"]).astype(jnp.float32)
    logits += bias.reshape((1,) * len(rows) + (-1,))
    g = jax.nn.log_sigmoid(logits) / cfg.gate_root
    return q, k, v, g.reshape(*rows, cfg.n_heads, cfg.K)


@contract.forward
def forward(
    params: Any,
    x: Float[Array, "B T width"],
    cfg: Config,
    *,
    state: GLAState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T width"], GLAState | None]:
    """Compute the chunked parallel form; see `jaxlab.mixers` for the contract."""
    q, k, v, g = (
        constrain(a, "batch", "time", "heads", None) for a in _project(params, x, cfg)
    )
    o, memory = pallas_kernels.gated_linear_attention(
        q,
        k,
        v,
        g,
        initial_state=None if state is None else state.memory,
        segment_ids=segment_ids,
        chunk_size=cfg.chunk_size,
        implementation=cfg.implementation,
    )
    return gated_output(params, x, o), None if state is None else GLAState(memory)


@contract.step
def step(
    params: Any, x: Float[Array, "B width"], cfg: Config, state: GLAState
) -> tuple[Float[Array, "B width"], GLAState]:
    """Compute one token by the recurrence, at a cost independent of the position."""
    q, k, v, g = _project(params, x, cfg)
    o, memory = pallas_kernels.gated_linear_attention(
        q[:, None],
        k[:, None],
        v[:, None],
        g[:, None],
        initial_state=state.memory,
        implementation=cfg.implementation,
    )
    return gated_output(params, x, o[:, 0]), GLAState(memory)
