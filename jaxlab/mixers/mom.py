"""Mixture-of-Memories: several matrix states, of which each token uses a few.

A router sends every token to `top_k` of `n_memories` memories, and all tokens to one
shared memory. A memory is a linear recurrence over the tokens that reach it, with its
own keys, values, steps and decays; for the others it stands still:

    p_t = softmax(x_t W_router),  w_t = p_t on its top k memories, rescaled to sum 1
    S^m_t = e^{g^m_t} (I - beta^m_t k^m_t k^m_t^T) S^m_{t-1} + beta^m_t k^m_t v^m_t^T
    o_t = K^{-1/2} (sum over its m of w^m_t S^m_t + S^shared_t)^T q^m_t

so that the state grows by memories while the work a token grows by `top_k` alone. The
tokens' choices are sorted by memory into one stream (`layers.routing`): a grouped
product makes keys and values, and one call of the recurrence runs all memories.

| rule | step beta | decay g | |
|---|---|---|---|
| ``gated_delta_rule`` | yes | yes | the paper's, arXiv 2412.06464 |
| ``delta_rule`` | yes | | arXiv 2406.06484 |
| ``gated_linear_attention`` | | yes | a decay a head, no erasing: v in place of error |
| ``linear_attention`` | | | |

With ``top_k=1`` the weight is 1 and only the balance loss teaches the router.

Differs from the paper's code in:
1. the short convolutions run along each memory's own tokens and never see those of
   another memory, batch row or document, in training as in decoding;
2. the router, the weights, beta and the decay are float32 whatever the activations are;
3. the balance loss is of one layer's tokens, not of all layers' together.

Dimension key: B batch, T time, k memories a token (the shared one included), M all
memories, N = B T k rows of the stream, S = M B sequences, H heads, K key size, V value
size, W taps.

Reference: Du et al., "MoM: Linear Sequence Modeling with Mixture-of-Memories", arXiv
2502.13685, eq. 3-8.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.nn import initializers
from jaxtyping import Array, Float, Int

import pallas_kernels
from jaxlab.layers import convolution_step, l2_normalize, rms_norm, segments
from jaxlab.layers.initial import (
    inverse_softplus_of_time_step,
    log_of_uniform,
    uniform,
)
from jaxlab.layers.routing import (
    Stream,
    sort_by_memory,
    stream_convolution,
    to_choices,
    to_rows,
)
from jaxlab.params import ParamSpec, grouped_linear, linear, value

DELTA_RULES = ("gated_delta_rule", "delta_rule")
DECAYING_RULES = ("gated_delta_rule", "gated_linear_attention")
RULES = (*DELTA_RULES, "gated_linear_attention", "linear_attention")
CONVOLUTIONS = ("conv_q", "conv_k", "conv_v")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and variants of a Mixture-of-Memories layer."""

    width: int  # the model's width
    n_heads: int = 4
    key_size: int | None = None  # a head's; None: width / n_heads
    value_size: int | None = None  # a head's; None: as the key
    n_memories: int = 4  # the router chooses among; the shared one comes on top
    top_k: int = 2  # memories a token is routed to
    shared_memory: bool = True  # one more, that every token uses
    rule: str = "gated_delta_rule"  # how a memory changes; one of RULES
    output_gate: bool = True  # silu(x W_gate) on the normalised output
    convolution: int = 4  # taps of the short convolutions on q, k, v; 0: none
    balance_weight: float = 0.01  # of the loss that keeps the memories equally used
    chunk_size: int | None = None  # of the parallel form; None: the kernel's choice
    implementation: str | None = None  # of the kernel; None: the best that can run

    def __post_init__(self):
        for name in (
            *("width", "n_heads", "key_size", "value_size"),
            *("n_memories", "top_k", "chunk_size"),
        ):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}={size} must be at least 1.")
        if self.key_size is None and self.width % self.n_heads:
            raise ValueError(
                f"width={self.width} is not divisible by n_heads={self.n_heads}; "
                "choose another number of heads or set key_size."
            )
        if self.top_k > self.n_memories:
            raise ValueError(
                f"top_k={self.top_k} is above n_memories={self.n_memories}; a token "
                "uses a memory once, so choose at most as many as there are."
            )
        if self.rule not in RULES:
            raise ValueError(f"rule={self.rule!r} is not one of {RULES}.")
        if self.convolution < 0:
            raise ValueError(f"convolution={self.convolution} taps; 0 means none.")
        if self.balance_weight < 0:
            raise ValueError(
                f"balance_weight={self.balance_weight} is below 0, which would reward "
                "unequal use; 0 means no balance loss."
            )

    @property
    def K(self) -> int:
        return self.key_size or self.width // self.n_heads

    @property
    def V(self) -> int:
        return self.value_size or self.K

    @property
    def M(self) -> int:
        """All memories; the shared one is the last."""
        return self.n_memories + self.shared_memory


def spec(cfg: Config) -> dict[str, ParamSpec]:
    """Parameters of the layer."""
    H, K, V, M = cfg.n_heads, cfg.K, cfg.V, cfg.M

    def per_memory(channels):
        return ParamSpec(
            (M, cfg.width, channels), (None, "width", "heads"), _fan_in_of_each
        )

    def taps(channels):
        bound = cfg.convolution**-0.5
        return ParamSpec(
            (cfg.convolution, channels),
            (None, "heads"),
            uniform(-bound, bound),
            "convolution",
        )

    specs = {
        "w_router": ParamSpec((cfg.width, cfg.n_memories), ("width", None)),
        "w_q": ParamSpec((cfg.width, H * K), ("width", "heads")),
        "w_k": per_memory(H * K),
        "w_v": per_memory(H * V),
        "norm": ParamSpec((V,), (None,), initializers.ones, "scale"),
        "w_o": ParamSpec((H * V, cfg.width), ("heads", "width")),
    }
    if cfg.convolution:
        specs |= {"conv_q": taps(H * K), "conv_k": taps(H * K), "conv_v": taps(H * V)}
    if cfg.rule in DELTA_RULES:
        specs["w_beta"] = per_memory(H)
    if cfg.rule in DECAYING_RULES:
        specs |= {
            "w_decay": per_memory(H),
            "a_log": ParamSpec((H,), ("heads",), log_of_uniform(1, 16), "decay"),
            "dt_bias": ParamSpec(
                (H,), ("heads",), inverse_softplus_of_time_step, "decay"
            ),
        }
    if cfg.output_gate:
        specs["w_gate"] = ParamSpec((cfg.width, H * V), ("width", "heads"))
    return specs


_fan_in_of_each = initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal", batch_axis=0
)


@struct.dataclass
class MoMState:
    """What a layer remembers, the shared memory last.

    Attributes:
        memory: float32 ``[B, M, H, K, V]``, the matrices S.
        conv_q, conv_k, conv_v: the last inputs of the convolutions along each memory's
            tokens, ``[B, M, W - 1, channels]``; None without convolutions.
    """

    memory: Float[Array, "B M H K V"]
    conv_q: Float[Array, "B M W-1 HK"] | None
    conv_k: Float[Array, "B M W-1 HK"] | None
    conv_v: Float[Array, "B M W-1 HV"] | None


def init_state(
    cfg: Config, batch: int, max_length: int | None = None, dtype: Any = jnp.float32
) -> MoMState:
    """The state before the first token; `max_length` does not matter to it."""
    H, K, V, M = cfg.n_heads, cfg.K, cfg.V, cfg.M

    def tail(channels):
        if not cfg.convolution:
            return None
        return jnp.zeros((batch, M, cfg.convolution - 1, channels), dtype)

    return MoMState(
        memory=jnp.zeros((batch, M, H, K, V), jnp.float32),
        conv_q=tail(H * K),
        conv_k=tail(H * K),
        conv_v=tail(H * V),
    )


def _route(params, x, cfg: Config):
    """The router's probabilities ``[B, T, n_memories]`` and its choices (eq. 3)."""
    logits = linear(x.astype(jnp.float32), params["w_router"])
    probabilities = jax.nn.softmax(logits)
    return probabilities, jax.lax.top_k(probabilities, cfg.top_k)[1]


def _memories(params, x, cfg: Config):
    """The k memories of each token and their weights, ``[B, T, k]``."""
    probabilities, chosen = _route(params, x, cfg)
    weights = jnp.take_along_axis(probabilities, chosen, axis=-1)
    weights /= jnp.sum(weights, axis=-1, keepdims=True)
    if cfg.shared_memory:
        one_more = ((0, 0), (0, 0), (0, 1))
        chosen = jnp.pad(chosen, one_more, constant_values=cfg.n_memories)
        weights = jnp.pad(weights, one_more, constant_values=1.0)
    return chosen, weights


def auxiliary_loss(
    params: Any,
    x: Float[Array, "B T width"],
    cfg: Config,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """Balance loss: ``balance_weight * M sum_m (share of m's tokens) (mean p of m)``.

    Over the routed memories and the tokens that are no padding. The shares sum to
    `top_k`; equal shares, the least unequal use, give ``balance_weight * top_k``.

    Reference: Fedus et al., Switch Transformers, arXiv 2101.03961, eq. 4.
    """
    probabilities, chosen = _route(params, x, cfg)
    is_real = jnp.ones(x.shape[:2], bool)
    if segment_ids is not None:
        is_real = segments.real(segment_ids)
    tokens = jnp.maximum(jnp.sum(is_real), 1).astype(jnp.float32)
    count = jax.nn.one_hot(chosen, cfg.n_memories, dtype=jnp.float32)
    of_real = is_real.astype(jnp.float32)[..., None]
    share = jnp.sum(jnp.sum(count, axis=2) * of_real, axis=(0, 1)) / tokens
    mean = jnp.sum(probabilities * of_real, axis=(0, 1)) / tokens
    return cfg.balance_weight * cfg.n_memories * jnp.sum(share * mean)


def _rows(params, x_BT, chosen, cfg: Config, segment_ids=None):
    """The stream, and the inputs of the convolutions, beta and g in its rows (eq. 4).

    Queries are those of the tokens, keys and values those of the memories.
    """
    stream = sort_by_memory(chosen, cfg.M, segment_ids)
    q = to_rows(linear(x_BT, params["w_q"]), stream)
    x = to_rows(x_BT, stream)
    project = lambda name: grouped_linear(x, params[name], stream.sizes)  # noqa: E731
    beta = g = None
    if cfg.rule in DELTA_RULES:
        beta = jax.nn.sigmoid(project("w_beta").astype(jnp.float32))
    if cfg.rule in DECAYING_RULES:
        rate = jnp.exp(value(params["a_log"]).astype(jnp.float32))[None]
        bias = value(params["dt_bias"]).astype(jnp.float32)[None]
        g = -rate * jax.nn.softplus(project("w_decay").astype(jnp.float32) + bias)
    return stream, (q, project("w_k"), project("w_v")), beta, g


def _heads(q, k, v, cfg: Config):
    """Activate; split into heads; normalise queries and keys."""
    q, k, v = (jax.nn.silu(a).reshape(a.shape[0], cfg.n_heads, -1) for a in (q, k, v))
    return l2_normalize(q), l2_normalize(k), v


def _output(params, x, o_N, weights, stream: Stream, cfg: Config):
    """Mix the memories (eq. 7), normalise each head, gate, project."""
    o = to_choices(o_N, stream).astype(jnp.float32)
    o = jnp.sum(weights[..., None, None] * o, axis=2).astype(x.dtype)
    o = rms_norm(o, value(params["norm"])).reshape(*x.shape[:2], -1)
    if cfg.output_gate:
        o = o * jax.nn.silu(linear(x, params["w_gate"]))
    return linear(o, params["w_o"])


def forward(
    params: Any,
    x: Float[Array, "B T width"],
    cfg: Config,
    *,
    state: MoMState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T width"], MoMState | None]:
    """The parallel form, one stream of all memories; see `jaxlab.mixers`."""
    chosen, weights = _memories(params, x, cfg)
    stream, inputs, beta, g = _rows(params, x, chosen, cfg, segment_ids)
    tails = dict.fromkeys(CONVOLUTIONS)
    if cfg.convolution:
        convolved = []
        for name, a in zip(CONVOLUTIONS, inputs, strict=True):
            tail = None if state is None else _by_sequence(getattr(state, name))
            a, tail = stream_convolution(a, value(params[name]), stream, tail)
            convolved.append(a)
            tails[name] = None if state is None else _by_batch(tail, cfg)
        inputs = convolved
    q, k, v = _heads(*inputs, cfg)
    if segment_ids is not None:  # a decay by zero starts a document anew
        g = jnp.zeros(q.shape[:2], jnp.float32) if g is None else g
        g = jnp.where(stream.resets[:, None], -jnp.inf, g)
    o, memory = _recurrence(
        *(q, k, v, beta, g),
        initial_state=None if state is None else _by_sequence(state.memory),
        cu_seqlens=stream.cu_seqlens,
        chunk_size=cfg.chunk_size,
        implementation=cfg.implementation,
    )
    y = _output(params, x, o, weights, stream, cfg)
    if state is None:
        return y, None
    memory = jnp.where(stream.carries[:, None, None, None], memory, 0.0)
    return y, MoMState(_by_batch(memory, cfg), **tails)


def _recurrence(q, k, v, beta, g, **options):
    """The rule of the memories (eq. 5 and table 1) on rows ``[N, H, ...]``."""
    row = lambda a: None if a is None else a[None]  # noqa: E731
    if beta is None:
        run = pallas_kernels.gated_linear_attention
        o, state = run(row(q), row(k), row(v), row(g), **options)
    else:
        run = pallas_kernels.delta_rule
        o, state = run(row(q), row(k), row(v), row(beta), row(g), **options)
    return o[0], state


def _by_sequence(a: Array) -> Array:
    """[B, M, ...] to [S, ...], memories first."""
    return jnp.swapaxes(a, 0, 1).reshape(-1, *a.shape[2:])


def _by_batch(a: Array, cfg: Config) -> Array:
    """[S, ...] to [B, M, ...]."""
    return jnp.swapaxes(a.reshape(cfg.M, -1, *a.shape[1:]), 0, 1)


def step(
    params: Any, x: Float[Array, "B width"], cfg: Config, state: MoMState
) -> tuple[Float[Array, "B width"], MoMState]:
    """The recurrence itself, one token: reads and writes its k memories alone."""
    x_BT = x[:, None]
    chosen, weights = _memories(params, x_BT, cfg)
    stream, inputs, beta_NH, g_NH = _rows(params, x_BT, chosen, cfg)
    B = x.shape[0]
    own = stream.sequence % B, stream.sequence // B  # batch row and memory
    tails = dict.fromkeys(CONVOLUTIONS)
    if cfg.convolution:
        convolved = []
        for name, a in zip(CONVOLUTIONS, inputs, strict=True):
            old = getattr(state, name)
            a, tail = convolution_step(a, value(params[name]), old[own])
            convolved.append(a)
            tails[name] = old.at[own].set(tail.astype(old.dtype))
        inputs = convolved
    q, k, v = _heads(*inputs, cfg)
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))

    S_NHKV = state.memory[own]
    if g_NH is not None:
        S_NHKV = jnp.exp(g_NH)[..., None, None] * S_NHKV
    write_NHV = v
    if beta_NH is not None:
        error = v - jnp.einsum("nhk,nhkv->nhv", k, S_NHKV)
        write_NHV = beta_NH[..., None] * error
    S_NHKV = S_NHKV + k[..., :, None] * write_NHV[..., None, :]
    o = cfg.K**-0.5 * jnp.einsum("nhk,nhkv->nhv", q, S_NHKV)
    y = _output(params, x_BT, o.astype(x.dtype), weights, stream, cfg)
    return y[:, 0], MoMState(state.memory.at[own].set(S_NHKV), **tails)
