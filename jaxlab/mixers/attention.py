"""Causal softmax attention: grouped queries, rotary positions, optional window.

    o_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(D)) v_s

Each group of ``n_heads / n_kv_heads`` query heads shares one key and value head. With
a window w, a token sees itself and the w - 1 tokens before it, at a cost linear in T.

References: Vaswani et al., arXiv 1706.03762; grouped queries, Ainslie et al., arXiv
2305.13245; normalised queries and keys, Henry et al., arXiv 2010.04245.

Dimension key: B batch, T time, H query heads, G key heads, D head size.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from jaxlab.layers import (
    KVCache,
    contract,
    init_cache,
    rms_norm,
    rotary,
    segments,
    softmax_attention,
    softmax_attention_step,
)
from jaxlab.mixers.sizes import check_heads, check_sizes
from jaxlab.params import ParamSpec, constrain, linear, value


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of an attention layer."""

    width: int  # the model's width
    n_heads: int = 4  # query heads
    n_kv_heads: int | None = None  # key and value heads; None: n_heads
    head_size: int | None = None  # None: width / n_heads
    window: int | None = None  # tokens that each token sees, with itself; None: all
    qk_norm: bool = False  # RMS-normalise queries and keys in each head
    rope_base: float = 10_000.0  # base of the wavelengths of rotary positions

    def __post_init__(self):
        check_sizes(self, "width", "n_heads", "n_kv_heads", "head_size", "window")
        check_heads(self, "head_size")
        if self.D % 2:
            raise ValueError(
                f"head_size={self.D} must be even; rotary positions rotate channels in "
                "pairs."
            )
        if self.n_heads % self.G:
            raise ValueError(
                f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.G}; "
                "each key head must serve the same number of query heads."
            )

    @property
    def D(self) -> int:
        return self.head_size or self.width // self.n_heads

    @property
    def G(self) -> int:
        return self.n_kv_heads or self.n_heads


def spec(cfg: Config) -> dict[str, ParamSpec]:
    """The parameters of the layer."""
    q_size, kv_size = cfg.n_heads * cfg.D, cfg.G * cfg.D
    specs = {
        "w_q": ParamSpec((cfg.width, q_size), ("width", "heads")),
        "w_k": ParamSpec((cfg.width, kv_size), ("width", "heads")),
        "w_v": ParamSpec((cfg.width, kv_size), ("width", "heads")),
        "w_o": ParamSpec((q_size, cfg.width), ("heads", "width")),
    }
    if cfg.qk_norm:
        scale = ParamSpec((cfg.D,), (None,), initializers.ones, "scale")
        specs |= {"q_norm": scale, "k_norm": scale}
    return specs


AttentionState = KVCache


def init_state(
    cfg: Config, batch: int, max_length: int, dtype: Any = jnp.float32
) -> AttentionState:
    """An empty cache for ``min(max_length, window)`` tokens.

    Beyond `max_length` the oldest token is overwritten: `step` continues with a window
    of `max_length`, and `forward` sees at least that many tokens.
    """
    slots = min(max_length, cfg.window or max_length)
    return init_cache(batch, slots, cfg.G, cfg.D, dtype)


def _project(params, x_BTd, positions_BT, cfg: Config):
    B, T, _ = x_BTd.shape
    q = linear(x_BTd, params["w_q"]).reshape(B, T, cfg.n_heads, cfg.D)
    k = linear(x_BTd, params["w_k"]).reshape(B, T, cfg.G, cfg.D)
    v = linear(x_BTd, params["w_v"]).reshape(B, T, cfg.G, cfg.D)
    if cfg.qk_norm:
        q = rms_norm(q, value(params["q_norm"]))
        k = rms_norm(k, value(params["k_norm"]))
    q = rotary(q, positions_BT, cfg.rope_base)
    k = rotary(k, positions_BT, cfg.rope_base)
    return tuple(constrain(a, "batch", "time", "heads", None) for a in (q, k, v))


@contract.forward
def forward(
    params: Any,
    x: Float[Array, "B T width"],
    cfg: Config,
    *,
    state: AttentionState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T width"], AttentionState | None]:
    """Attend over whole sequences; see `jaxlab.mixers` for the contract."""
    B, T, _ = x.shape
    ids = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids
    ids = segments.documents(ids)
    start = jnp.zeros((B,), jnp.int32) if state is None else state.length
    positions = segments.positions(ids, start)
    q, k, v = _project(params, x, positions, cfg)
    o, state = softmax_attention(
        q, k, v, ids, positions, window=cfg.window, cache=state
    )
    return linear(o.reshape(B, T, -1), params["w_o"]), state


@contract.step
def step(
    params: Any, x: Float[Array, "B width"], cfg: Config, state: AttentionState
) -> tuple[Float[Array, "B width"], AttentionState]:
    """Write one token's key and value to the cache, then read the cache."""
    q, k, v = _project(params, x[:, None], state.length[:, None], cfg)
    o, state = softmax_attention_step(
        q[:, 0], k[:, 0], v[:, 0], cache=state, window=cfg.window
    )
    return linear(o.reshape(x.shape[0], -1), params["w_o"]), state
