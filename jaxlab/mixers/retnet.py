"""RetNet's retention: a memory that decays at a fixed rate for each head.

    q_n, k_n = rotations of x_n W_q and x_n W_k by n times the angles of the channels
    S_n      = gamma S_{n-1} + k_n v_n^T,      gamma_h = 1 - 2^{-5-h}          (eq. 6)
    o_n      = S_n^T q_n
    y_n      = (silu(x_n W_gate) * norm_h(o_n)) W_o                            (eq. 8)

The rate sets how far a head reaches back: the memory of head h, counted from 0, halves
in about 22 * 2^h tokens.

Reference: Sun et al., Retentive Network, arXiv 2307.08621, section 2.

Differs from the paper in:
1. the norm of each head is RMSNorm with a learned scale instead of GroupNorm; as with
   GroupNorm, the paper's factors for q.k, for the decays' row sums and for the outputs
   cancel;
2. channels are rotated in pairs (i, i + K/2), where the paper pairs neighbours;
3. positions restart at every document of a packed row.

Dimension key: B batch, T time, H heads, K key size, V value size.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import struct
from jax.nn import initializers
from jaxtyping import Array, Float, Int

import pallas_kernels
from jaxlab.layers import contract, gated_output, rotary, segments
from jaxlab.mixers.sizes import check_heads, check_sizes
from jaxlab.params import ParamSpec, constrain, linear


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a retention layer."""

    width: int  # the model's width
    n_heads: int = 4
    key_size: int | None = None  # per head; None: width / n_heads
    value_size: int | None = None  # per head; None: twice the key size
    rope_base: float = 10_000.0  # base of the wavelengths of rotary positions
    chunk_size: int | None = None  # tokens in a chunk; None: the kernel's choice
    implementation: str | None = None  # kernel to use; None: the best available

    may_differ: ClassVar[tuple[str, ...]] = ("chunk_size", "implementation")

    def __post_init__(self):
        check_sizes(self, "width", "n_heads", "key_size", "value_size", "chunk_size")
        check_heads(self, "key_size")
        if self.K % 2:
            raise ValueError(
                f"key_size={self.K} must be even; rotary positions rotate channels in "
                "pairs."
            )

    @property
    def K(self) -> int:
        return self.key_size or self.width // self.n_heads

    @property
    def V(self) -> int:
        return self.value_size or 2 * self.K


def spec(cfg: Config) -> dict[str, ParamSpec]:
    """The parameters of the layer; the rates are constants."""
    keys, values = cfg.n_heads * cfg.K, cfg.n_heads * cfg.V
    return {
        "w_q": ParamSpec((cfg.width, keys), ("width", "heads")),
        "w_k": ParamSpec((cfg.width, keys), ("width", "heads")),
        "w_v": ParamSpec((cfg.width, values), ("width", "heads")),
        "norm": ParamSpec((cfg.V,), (None,), initializers.ones, "scale"),
        "w_gate": ParamSpec((cfg.width, values), ("width", "heads")),
        "w_o": ParamSpec((values, cfg.width), ("heads", "width")),
    }


def log_decay(cfg: Config) -> Float[Array, " H"]:
    """Return log gamma of each head."""
    return jnp.log1p(-(2.0 ** (-5 - jnp.arange(cfg.n_heads, dtype=jnp.float32))))


@struct.dataclass
class RetNetState:
    """The state of a layer after a token.

    Attributes:
        memory: float32 ``[B, H, K, V]``, the matrix S.
        length: int32 ``[B]``, tokens of the document so far.
    """

    memory: Float[Array, "B H K V"]
    length: Int[Array, " B"]


def init_state(
    cfg: Config, batch: int, max_length: int | None = None, dtype: Any = jnp.float32
) -> RetNetState:
    """The state before the first token; `max_length` and `dtype` have no effect."""
    return RetNetState(
        memory=jnp.zeros((batch, cfg.n_heads, cfg.K, cfg.V), jnp.float32),
        length=jnp.zeros((batch,), jnp.int32),
    )


def _project(params, x_BTd, positions_BT, cfg: Config):
    B, T, _ = x_BTd.shape
    q = linear(x_BTd, params["w_q"]).reshape(B, T, cfg.n_heads, cfg.K)
    k = linear(x_BTd, params["w_k"]).reshape(B, T, cfg.n_heads, cfg.K)
    v = linear(x_BTd, params["w_v"]).reshape(B, T, cfg.n_heads, cfg.V)
    q = rotary(q, positions_BT, cfg.rope_base)
    k = rotary(k, positions_BT, cfg.rope_base)
    return tuple(constrain(a, "batch", "time", "heads", None) for a in (q, k, v))


@contract.forward
def forward(
    params: Any,
    x: Float[Array, "B T width"],
    cfg: Config,
    *,
    state: RetNetState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T width"], RetNetState | None]:
    """Compute the chunked parallel form; see `jaxlab.mixers` for the contract."""
    B, T, _ = x.shape
    ids = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids
    ids = segments.documents(ids)
    start = jnp.zeros((B,), jnp.int32) if state is None else state.length
    positions = segments.positions(ids, start)
    q, k, v = _project(params, x, positions, cfg)
    g = jnp.broadcast_to(log_decay(cfg)[None, None], (B, T, cfg.n_heads))
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
    y = gated_output(params, x, o)
    if state is None:
        return y, None
    last = segments.at(positions, segments.end_real(ids) - 1)
    any_real = jnp.any(segments.real(ids), axis=1)
    return y, RetNetState(memory, jnp.where(any_real, last + 1, start))


@contract.step
def step(
    params: Any, x: Float[Array, "B width"], cfg: Config, state: RetNetState
) -> tuple[Float[Array, "B width"], RetNetState]:
    """Compute one token by the recurrence, at a cost independent of the position."""
    q, k, v = _project(params, x[:, None], state.length[:, None], cfg)
    g = jnp.broadcast_to(log_decay(cfg)[None, None], (len(x), 1, cfg.n_heads))
    o, memory = pallas_kernels.gated_linear_attention(
        q,
        k,
        v,
        g,
        initial_state=state.memory,
        implementation=cfg.implementation,
    )
    y = gated_output(params, x, o[:, 0])
    return y, RetNetState(memory, state.length + 1)
