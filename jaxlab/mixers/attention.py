"""Causal softmax attention: grouped queries, rotary positions, optional window.

    o_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(D)) v_s

Every group of ``n_heads / n_kv_heads`` query heads shares one key and value head. With
a window w a token sees itself and the w - 1 tokens before it.

References: Vaswani et al., arXiv 1706.03762; grouped queries, Ainslie et al., arXiv
2305.13245; normalised queries and keys, Henry et al., arXiv 2010.04245.

Dimension key: B batch, T time, S slots of the cache, H query heads, G key heads, D head
size.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from jaxlab.layers import rms_norm, rotary, segments
from jaxlab.params import ParamSpec, constrain, linear, value


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of an attention layer."""

    width: int  # the model's width
    n_heads: int = 4  # query heads
    n_kv_heads: int | None = None  # key and value heads; None: as many as queries
    head_size: int | None = None  # None: width / n_heads
    window: int | None = None  # tokens seen, the present one included; None: all
    qk_norm: bool = False  # RMS-normalise queries and keys a head
    rope_base: float = 10_000.0  # wavelength base of the rotary positions

    def __post_init__(self):
        for name in ("width", "n_heads", "n_kv_heads", "head_size", "window"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}={size} must be at least 1.")
        if self.head_size is None and self.width % self.n_heads:
            raise ValueError(
                f"width={self.width} is not divisible by n_heads={self.n_heads}; "
                "choose another number of heads or set head_size."
            )
        if self.D % 2:
            raise ValueError(
                f"head_size={self.D} is odd; rotary positions turn pairs of channels."
            )
        if self.n_heads % self.G:
            raise ValueError(
                f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.G}: "
                "every key head serves the same number of query heads."
            )

    @property
    def D(self) -> int:
        return self.head_size or self.width // self.n_heads

    @property
    def G(self) -> int:
        return self.n_kv_heads or self.n_heads


def spec(cfg: Config) -> dict[str, ParamSpec]:
    """Parameters of the layer."""
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


@struct.dataclass
class AttentionState:
    """The keys and values of one document, in a ring of S slots.

    Attributes:
        k, v: ``[B, S, G, D]``.
        position: int32 ``[B, S]``, the place of each slot's token; -1 if empty.
        length: int32 ``[B]``, tokens of the document so far.
    """

    k: Float[Array, "B S G D"]
    v: Float[Array, "B S G D"]
    position: Int[Array, "B S"]
    length: Int[Array, " B"]


def init_state(
    cfg: Config, batch: int, max_length: int, dtype: Any = jnp.float32
) -> AttentionState:
    """An empty cache.

    It holds ``min(max_length, window)`` tokens. Past `max_length` the oldest token is
    overwritten: `step` goes on with a window of `max_length`, and `forward` sees at
    least that much.
    """
    slots = min(max_length, cfg.window or max_length)
    kv = jnp.zeros((batch, slots, cfg.G, cfg.D), dtype)
    return AttentionState(
        k=kv,
        v=kv,
        position=jnp.full((batch, slots), -1, jnp.int32),
        length=jnp.zeros((batch,), jnp.int32),
    )


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


def _in_window(cfg: Config, query_position, key_position):
    if cfg.window is None:
        return True
    return query_position - key_position < cfg.window


def _attend(q_BTHD, k_BSGD, v_BSGD, visible_BTS):
    """Softmax attention with scores and weights in float32; R queries a group."""
    B, T, H, D = q_BTHD.shape
    q_BTGRD = q_BTHD.reshape(B, T, k_BSGD.shape[2], -1, D)
    scores = jnp.einsum(
        "btgrd,bsgd->bgrts", q_BTGRD, k_BSGD, preferred_element_type=jnp.float32
    )
    # A finite fill: a row that sees nothing gets a mean instead of NaN.
    fill = jnp.finfo(jnp.float32).min
    scores = jnp.where(visible_BTS[:, None, None], D**-0.5 * scores, fill)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSGD.dtype)
    return jnp.einsum("bgrts,bsgd->btgrd", weights, v_BSGD).reshape(q_BTHD.shape)


def forward(
    params: Any,
    x: Float[Array, "B T width"],
    cfg: Config,
    *,
    state: AttentionState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T width"], AttentionState | None]:
    """Attention over whole sequences; see `jaxlab.mixers` for the contract."""
    B, T, _ = x.shape
    ids = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids
    ids = segments.documents(ids)
    start = jnp.zeros((B,), jnp.int32) if state is None else state.length
    positions = segments.positions(ids, start)
    q, k, v = _project(params, x, positions, cfg)

    index = jnp.arange(T, dtype=jnp.int32)
    visible = (
        (ids[:, :, None] == ids[:, None, :])
        & segments.real(ids)[:, None, :]
        & (index[None, :, None] >= index[None, None, :])
        & _in_window(cfg, positions[:, :, None], positions[:, None, :])
    )
    keys, values = k, v
    if state is not None:
        continues = ids == segments.at(ids, segments.first_real(ids))[:, None]
        from_cache = (
            continues[:, :, None]
            & (state.position >= 0)[:, None, :]
            & _in_window(cfg, positions[:, :, None], state.position[:, None, :])
        )
        visible = jnp.concatenate([from_cache, visible], axis=2)
        keys = jnp.concatenate([state.k.astype(k.dtype), k], axis=1)
        values = jnp.concatenate([state.v.astype(v.dtype), v], axis=1)
    o = _attend(q, keys, values, visible)
    if segment_ids is not None:  # padding sees nothing, so its output is nothing
        o = jnp.where(segments.real(ids)[..., None, None], o, 0)
    y = linear(o.reshape(B, T, -1), params["w_o"])
    return y, None if state is None else _store(state, k, v, ids, positions)


def _store(state: AttentionState, k, v, ids, positions) -> AttentionState:
    """Write the last document's newest tokens; an older document is forgotten."""
    slots = state.position.shape[1]
    last_id = segments.at(ids, segments.end_real(ids) - 1)
    none_real = last_id < 0
    length = jnp.where(
        none_real,
        state.length,
        1 + jnp.max(jnp.where(ids == last_id[:, None], positions, -1), axis=1),
    )
    replaced = last_id != segments.at(ids, segments.first_real(ids))
    kept = jnp.where((replaced & ~none_real)[:, None], -1, state.position)
    newest = (
        (ids == last_id[:, None])
        & segments.real(ids)
        & (positions >= length[:, None] - slots)
    )
    slot = jnp.where(
        newest, positions % slots, slots
    )  # slot S is out of range: dropped
    row = jnp.arange(ids.shape[0])[:, None]
    return AttentionState(
        k=state.k.at[row, slot].set(k.astype(state.k.dtype), mode="drop"),
        v=state.v.at[row, slot].set(v.astype(state.v.dtype), mode="drop"),
        position=kept.at[row, slot].set(positions, mode="drop"),
        length=length,
    )


def step(
    params: Any, x: Float[Array, "B width"], cfg: Config, state: AttentionState
) -> tuple[Float[Array, "B width"], AttentionState]:
    """One token: write its key and value, then read the cache."""
    q, k, v = _project(params, x[:, None], state.length[:, None], cfg)
    row = jnp.arange(x.shape[0])
    slot = state.length % state.position.shape[1]
    state = AttentionState(
        k=state.k.at[row, slot].set(k[:, 0].astype(state.k.dtype)),
        v=state.v.at[row, slot].set(v[:, 0].astype(state.v.dtype)),
        position=state.position.at[row, slot].set(state.length),
        length=state.length + 1,
    )
    visible = (state.position >= 0) & _in_window(
        cfg, state.length[:, None] - 1, state.position
    )
    o = _attend(q, state.k.astype(q.dtype), state.v.astype(q.dtype), visible[:, None])
    return linear(o.reshape(x.shape[0], -1), params["w_o"]), state
