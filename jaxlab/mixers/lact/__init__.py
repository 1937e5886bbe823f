"""LaCT: attention within a chunk, fast weights beyond it.

Softmax attention sees a sliding window. Older tokens are stored in the weights of a
small network for each head, which takes one large training step per chunk and is read
by every token (`fast_weights`):

    q, k, v = x W_q, x W_k, x W_v
    o = attention_window(q, k, v) + silu(x w_scale) RMSNorm(f_W(q'))       (algorithm 2)
    y = o W_o

with q' and k' the unit vectors of silu(scale * q + offset), turned by the rotary
positions, and v' = silu(v). The learning rates are softplus(x W_lr + b), one for each
token, head and matrix. The momentum is sigmoid(x W_momentum + b), averaged over a
chunk.

Chunk c is read with the weights after chunks < c, so that its own tokens see each other
in attention only: the window spans at least a chunk.

Differs from the paper in: the scale and offset apply to the fast queries and keys, as
in the released code (``scale_placement="attention"`` is the paper's). Differs from that
code in: every document starts a new chunk with the learned weights, and decoding
continues both; the code ignores documents there and starts again at every call. The
fast weights start with full rank (``init_rank=32`` is the code's), and the scale of the
fast branch starts at the size of its fan-in (in the code it is nearly off).

Reference: Zhang et al., "Test-Time Training Done Right", arXiv 2505.23884.

Dimension key: B batch, T time, H fast heads, D fast head size, F fast hidden size.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from jaxlab.layers import (
    KVCache,
    contract,
    init_cache,
    l2_normalize,
    rms_norm,
    rotary,
    segments,
    softmax_attention,
    softmax_attention_step,
)
from jaxlab.mixers.lact.fast_weights import FastWeights, Rule
from jaxlab.mixers.lact.ttt_scan import (
    ORDERS,
    FastState,
    init_fast_state,
    ttt_scan,
    ttt_step,
)
from jaxlab.mixers.sizes import check_sizes
from jaxlab.params import ParamSpec, abstract, constrain, linear, value

LAYER_ORDERS = tuple(order for order in ORDERS if order != "strided")
PLACEMENTS = ("fast", "attention")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and variants of a LaCT layer."""

    width: int  # the model's width
    n_heads: int = 4  # heads of attention
    n_fast_heads: int = 4  # the state holds 3 * inter_multi * width^2 / n_fast_heads
    inter_multi: int = 1  # hidden size of a fast head, as a multiple of the head size
    chunk_size: int = 256  # tokens a step; the paper trains with 2048 and more
    window: int | None = None  # tokens that attention sees; None: a chunk
    optimizer: str = "muon"  # trains the fast weights; or "gradient_descent"
    momentum: bool = True  # learned, per token
    norm_placement: str = "post"  # where weights are rescaled: "post", "pre", "none"
    newton_schulz: str = "schedule"  # Muon's coefficients; or "paper"
    base_lr: float = 1e-3  # at the start; Muon only uses ratios of rates
    order: str = "apply_update"  # the others are not causal: only forward, no state
    scale_placement: str = "fast"  # where scale and offset apply; or "attention"
    fast_rope: bool = True  # rotary positions on the fast queries and keys
    value_silu: bool = True  # silu on the fast values
    init_rank: int | None = None  # of the initial gate and up matrices; None: full
    rope_base: float = 10_000.0  # wavelength base of the rotary positions

    def __post_init__(self):
        check_sizes(
            self,
            "width",
            "n_heads",
            "n_fast_heads",
            "inter_multi",
            "chunk_size",
            "window",
            "init_rank",
        )
        for name in ("n_heads", "n_fast_heads"):
            if self.width % getattr(self, name):
                raise ValueError(
                    f"width={self.width} is not divisible by "
                    f"{name}={getattr(self, name)}; choose another number of heads."
                )
        if self.width // self.n_heads % 2:
            raise ValueError(
                f"width={self.width} / n_heads={self.n_heads} is an odd head size; "
                "rotary positions turn pairs of channels."
            )
        _ = self.rule  # checks the names in it
        if self.order not in LAYER_ORDERS:
            raise ValueError(
                f"order={self.order!r} is not one of {LAYER_ORDERS}; 'strided' needs "
                "to know which tokens write, so call ttt_scan of "
                "jaxlab.mixers.lact.ttt_scan for it."
            )
        if self.scale_placement not in PLACEMENTS:
            raise ValueError(
                f"scale_placement={self.scale_placement!r} is not one of {PLACEMENTS}."
            )
        if self.order == "apply_update" and self.span < self.chunk_size:
            raise ValueError(
                f"window={self.window} is smaller than chunk_size={self.chunk_size}: "
                "the last tokens of a chunk would not see its first, which no step "
                "holds yet. Choose a window of at least a chunk, or smaller chunks."
            )
        if self.base_lr <= 0:
            raise ValueError(f"base_lr={self.base_lr} must be above 0.")

    @property
    def span(self) -> int:
        """Tokens that attention sees."""
        return self.window or self.chunk_size

    @property
    def D(self) -> int:
        return self.width // self.n_fast_heads

    @property
    def F(self) -> int:
        return self.inter_multi * self.D

    @property
    def rule(self) -> Rule:
        return Rule(self.optimizer, self.norm_placement, self.newton_schulz)


def spec(cfg: Config) -> dict[str, ParamSpec]:
    """Declare the parameters; heads of the fast weights are side by side."""
    d, H, D, F = cfg.width, cfg.n_fast_heads, cfg.D, cfg.F
    square = ParamSpec((d, d), ("width", "heads"))
    zeros, ones = initializers.zeros, initializers.ones
    specs = {
        "w_q": square,
        "w_k": square,
        "w_v": square,
        "w_o": ParamSpec((d, d), ("heads", "width")),
        "fast_down": ParamSpec((F, H * D), (None, "heads")),
        "norm": ParamSpec((D,), (None,), ones, "scale"),
    }
    for name in ("q", "k"):
        specs[f"{name}_scale"] = ParamSpec((d,), ("heads",), ones, "scale")
        specs[f"{name}_offset"] = ParamSpec((d,), ("heads",), zeros, "bias")
    for name in ("fast_gate", "fast_up"):
        if cfg.init_rank is None:
            specs[name] = ParamSpec((D, H * F), (None, "heads"))
            continue
        # The factors of I / 2 + L R, small beside the identity.
        sides = {"left": (D, cfg.init_rank), "right": (cfg.init_rank, F)}
        for side, (n_in, n_out) in sides.items():
            small, shape = initializers.normal(0.5 * n_in**-0.5), (n_in, H * n_out)
            specs[f"{name}_{side}"] = ParamSpec(shape, (None, "heads"), small)
    for name, size in {"lr": 3 * H, "scale": H, "momentum": H}.items():
        if name != "momentum" or cfg.momentum:
            specs[f"w_{name}"] = ParamSpec((d, size), ("width", "heads"))
            specs[f"b_{name}"] = ParamSpec((size,), ("heads",), zeros, "bias")
    return specs


@struct.dataclass
class LactState:
    """The decoding state of a layer.

    Attributes:
        cache: the keys and values in the window.
        fast: the change of the fast weights, and the open chunk.
    """

    cache: KVCache
    fast: FastState

    @property
    def max_length(self) -> int:
        """The number of slots of the cache."""
        return self.cache.max_length


def init_state(
    cfg: Config, batch: int, max_length: int, dtype: Any = jnp.float32
) -> LactState:
    """Return the state before the first token.

    Its size does not grow with the length. If `max_length` is below the window,
    attention keeps only that many tokens.
    """
    slots, head_size = min(max_length, cfg.span), cfg.width // cfg.n_heads
    shapes = jax.eval_shape(lambda p: _initial_weights(p, cfg), abstract(spec(cfg)))
    return LactState(
        cache=init_cache(batch, slots, cfg.n_heads, head_size, dtype),
        fast=init_fast_state(
            shapes, batch, cfg.chunk_size, momentum=cfg.momentum, dtype=dtype
        ),
    )


def _initial_weights(params, cfg: Config) -> FastWeights:
    def heads(w):
        """Turn [in, H * out] into [H, in, out]."""
        w = w.astype(jnp.float32)
        return jnp.swapaxes(w.reshape(w.shape[0], cfg.n_fast_heads, -1), 0, 1)

    def into_hidden(name):
        if cfg.init_rank is None:
            return heads(value(params[name]))
        left, right = (value(params[f"{name}_{side}"]) for side in ("left", "right"))
        return 0.5 * jnp.eye(cfg.D, cfg.F)[None] + heads(left) @ heads(right)

    return FastWeights(
        gate=into_hidden("fast_gate"),
        up=into_hidden("fast_up"),
        down=heads(value(params["fast_down"])),
    )


def _project(params, x_BTd, positions_BT, cfg: Config):
    """Project to queries, keys and values of both branches, ``[B, T, heads, size]``."""
    B, T, _ = x_BTd.shape
    q, k, v = (linear(x_BTd, params[name]) for name in ("w_q", "w_k", "w_v"))

    def vector(name):
        return value(params[name]).astype(x_BTd.dtype)[None, None]

    q_scaled = q * vector("q_scale") + vector("q_offset")
    k_scaled = k * vector("k_scale") + vector("k_offset")

    def split(a, heads):
        return constrain(a.reshape(B, T, heads, -1), "batch", "time", "heads", None)

    def turn(a):
        return rotary(split(a, cfg.n_heads), positions_BT, cfg.rope_base)

    def fast(a):
        """Unit vectors of each fast head, turned by the angles of attention's heads."""
        a = l2_normalize(split(jax.nn.silu(a), cfg.n_fast_heads))
        return split(turn(a), cfg.n_fast_heads) if cfg.fast_rope else a

    fast_v = split(jax.nn.silu(v) if cfg.value_silu else v, cfg.n_fast_heads)
    if cfg.scale_placement == "fast":
        fast_q, fast_k = fast(q_scaled), fast(k_scaled)
    else:
        fast_q, fast_k = fast(q), fast(k)
        q, k = q_scaled, k_scaled
    return (turn(q), turn(k), split(v, cfg.n_heads)), (fast_q, fast_k, fast_v)


def _head(params, x, name: str):
    """Return ``x W + b``, float32."""
    y = linear(x, params[f"w_{name}"]).astype(jnp.float32)
    b = value(params[f"b_{name}"]).astype(jnp.float32)
    return y + b.reshape((1,) * (x.ndim - 1) + (-1,))


def _rates(params, x, cfg: Config):
    """Return eta ``[..., H, 3]`` and beta ``[..., H]`` (or None), float32."""
    start = cfg.base_lr + math.log(-math.expm1(-cfg.base_lr))  # softplus: base_lr
    eta = jax.nn.softplus(_head(params, x, "lr") + start)
    eta = eta.reshape(*x.shape[:-1], cfg.n_fast_heads, 3)
    beta = jax.nn.sigmoid(_head(params, x, "momentum")) if cfg.momentum else None
    return eta, beta


def _output(params, x, o_window, o_fast, cfg: Config):
    """Normalise and scale the fast heads, add attention, project."""
    scale = jax.nn.silu(_head(params, x, "scale"))
    o_fast = rms_norm(o_fast, value(params["norm"])) * scale[..., None]
    o = o_window.reshape(x.shape) + o_fast.reshape(x.shape).astype(x.dtype)
    return linear(o, params["w_o"])


@contract.forward
def forward(
    params: Any,
    x: Float[Array, "B T width"],
    cfg: Config,
    *,
    state: LactState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T width"], LactState | None]:
    """Run the layer by a scan over chunks; see `jaxlab.mixers` for the contract.

    The contract holds for the order "apply_update". In the others the fast branch sees
    future tokens: those of its chunk ("update_apply") or all of them ("update_all").
    """
    B, T, _ = x.shape
    ids = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids
    ids = segments.documents(ids)
    start = jnp.zeros((B,), jnp.int32) if state is None else state.cache.length
    positions = segments.positions(ids, start)
    attention_qkv, fast_qkv = _project(params, x, positions, cfg)
    o_window, cache = softmax_attention(
        *attention_qkv,
        ids,
        positions,
        window=cfg.span,
        cache=None if state is None else state.cache,
    )
    o_fast, fast = ttt_scan(
        _initial_weights(params, cfg),
        *fast_qkv,
        *_rates(params, x, cfg),
        chunk_size=cfg.chunk_size,
        rule=cfg.rule,
        order=cfg.order,
        state=None if state is None else state.fast,
        segment_ids=segment_ids,
    )
    y = _output(params, x, o_window, o_fast, cfg)
    if cache is None or fast is None:
        return y, None
    return y, LactState(cache, fast)


@contract.step
def step(
    params: Any, x: Float[Array, "B width"], cfg: Config, state: LactState
) -> tuple[Float[Array, "B width"], LactState]:
    """Run one token, which trains the fast weights if it fills a chunk."""
    if cfg.order != "apply_update":
        raise ValueError(
            f"order={cfg.order!r} reads a chunk after it was written, so its tokens "
            "cannot be decoded one by one; only 'apply_update' can."
        )
    attention_qkv, fast_qkv = _project(
        params, x[:, None], state.cache.length[:, None], cfg
    )
    o_window, cache = softmax_attention_step(
        *(a[:, 0] for a in attention_qkv), cache=state.cache, window=cfg.span
    )
    eta, beta = _rates(params, x, cfg)
    o_fast, fast = ttt_step(
        _initial_weights(params, cfg),
        *(a[:, 0] for a in fast_qkv),
        eta=eta,
        momentum=beta,
        state=state.fast,
        rule=cfg.rule,
    )
    return _output(params, x, o_window, o_fast, cfg), LactState(cache, fast)
