"""Mixture-of-Memories: several matrix states, of which each token uses a few.

A router sends every token to `top_k` of `n_memories` memories, and all tokens to one
shared memory. A memory is a linear recurrence over the tokens that reach it, with its
own keys, values, steps and decays; other tokens leave it as it is:

    p_t = softmax(x_t W_router),  w_t = p_t on its top k memories, rescaled to sum 1
    S^m_t = e^{g^m_t} (I - beta^m_t k^m_t k^m_t^T) S^m_{t-1} + beta^m_t k^m_t v^m_t^T
    o_t = K^{-1/2} sum over its m of w^m_t (S^m_t)^T q^m_t,  w = 1 for the shared one

so that the state grows with the number of memories, but the work only with `top_k`. The
choices are sorted by memory into one stream (`routing`): grouped products make its keys
and values, and one call of the recurrence runs all memories.

The other rules leave out the decay (``delta_rule``), the erasing and beta
(``gated_linear_attention``), or both (``linear_attention``).
With ``top_k=1`` the weight is 1 and only the balance loss teaches the router.

Differs from the paper's code in:
1. the short convolutions run along the tokens of one memory and never see those of
   another memory, batch row or document, in training as well as in decoding;
2. the router and the weights of the memories are float32 whatever the activations are,
   and so are beta and the decay from their logits on;
3. the balance loss is taken over the tokens of one layer, not of all layers together.

Dimension key: B batch, T time, k memories a token and M in all, with the shared one,
N = B T k rows, S = M B sequences, H heads, K key size, V value size, W taps.

Reference: Du et al., "MoM: Linear Sequence Modeling with Mixture-of-Memories", arXiv
2502.13685, eq. 3-8.
"""

import dataclasses
import functools
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
    segments,
)
from jaxlab.layers.decay import decay_rate
from jaxlab.mixers.mom import routing
from jaxlab.mixers.sizes import check_heads, check_sizes
from jaxlab.params import ParamSpec, grouped_linear, linear, over_batch_shards, value

DELTA_RULES = ("gated_delta_rule", "delta_rule")
DECAYING_RULES = ("gated_delta_rule", "gated_linear_attention")
RULES = (*DELTA_RULES, "gated_linear_attention", "linear_attention")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and variants of a Mixture-of-Memories layer."""

    width: int  # the model's width
    n_heads: int = 4
    key_size: int | None = None  # of a head; None: width / n_heads
    value_size: int | None = None  # of a head; None: the key size
    n_memories: int = 4  # memories to choose from; the shared one comes on top
    top_k: int = 2  # memories a token is routed to
    shared_memory: bool = True  # one more memory, which every token uses
    rule: str = "gated_delta_rule"  # how a memory changes; one of RULES
    output_gate: bool = True  # silu(x W_gate) on the normalised output
    convolution: int = 4  # taps of the short convolutions on q, k, v; 0: none
    balance_weight: float = 0.01  # weighs the loss that keeps memories equally used
    chunk_size: int | None = None  # of the parallel form; None: the kernel's choice
    implementation: str | None = None  # of the kernel; None: the best that can run

    may_differ: ClassVar[tuple[str, ...]] = ("chunk_size", "implementation")

    def __post_init__(self):
        check_sizes(
            self,
            "width",
            "n_heads",
            "key_size",
            "value_size",
            "n_memories",
            "top_k",
            "chunk_size",
        )
        check_heads(self, "key_size")
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
            raise ValueError(f"balance_weight={self.balance_weight} is below 0.")

    @property
    def K(self) -> int:
        return self.key_size or self.width // self.n_heads

    @property
    def V(self) -> int:
        return self.value_size or self.K

    @property
    def M(self) -> int:
        return self.n_memories + self.shared_memory  # the shared one is the last


def spec(cfg: Config) -> dict[str, ParamSpec]:
    """Declare the parameters of the layer."""
    H, K, V, M = cfg.n_heads, cfg.K, cfg.V, cfg.M

    def per_memory(channels):
        shape = M, cfg.width, channels
        return ParamSpec(shape, (None, "width", "heads"), _fan_in_of_each)

    def per_head(init):
        return ParamSpec((H,), ("heads",), init, "decay")

    def taps(channels):
        init = initial.uniform(-(cfg.convolution**-0.5), cfg.convolution**-0.5)
        shape = cfg.convolution, channels
        return ParamSpec(shape, (None, "heads"), init, "convolution")

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
            "a_log": per_head(initial.log_of_uniform(1, 16)),
            "dt_bias": per_head(initial.inverse_softplus_of_time_step),
        }
    if cfg.output_gate:
        specs["w_gate"] = ParamSpec((cfg.width, H * V), ("width", "heads"))
    return specs


_fan_in_of_each = initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal", batch_axis=0
)


@struct.dataclass
class MoMState:
    """The decoding state of a layer, the shared memory last.

    Attributes:
        memory: float32 ``[B, M, H, K, V]``, the matrices S.
        tails: the last inputs of the convolutions on q, k and v along each memory's
            tokens, ``[B, M, W - 1, channels]``; empty without convolutions.
    """

    memory: Float[Array, "B M H K V"]
    tails: tuple[Float[Array, "B M W-1 _"], ...]


def init_state(
    cfg: Config, batch: int, max_length: int | None = None, dtype: Any = jnp.float32
) -> MoMState:
    """Return the state before the first token, whatever `max_length` is."""
    H, K, V, M, W = cfg.n_heads, cfg.K, cfg.V, cfg.M, cfg.convolution
    channels = (H * K, H * K, H * V) if W else ()
    return MoMState(
        memory=jnp.zeros((batch, M, H, K, V), jnp.float32),
        tails=tuple(jnp.zeros((batch, M, W - 1, size), dtype) for size in channels),
    )


def _route(params, x, cfg: Config):
    """Return the router's probabilities ``[B, T, n_memories]`` and choices (eq. 3)."""
    probabilities = jax.nn.softmax(linear(x.astype(jnp.float32), params["w_router"]))
    return probabilities, jax.lax.top_k(probabilities, cfg.top_k)[1]


def _memories(params, x, cfg: Config):
    """Return the k memories of each token and their weights, ``[B, T, k]``."""
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
    """Return ``balance_weight * M sum_m (share of m's tokens) (mean p of m)``.

    This balance loss counts the M routed memories and the tokens that are not padding.
    The shares sum to `top_k`; equal shares give ``balance_weight * top_k``.

    Reference: Fedus et al., Switch Transformers, arXiv 2101.03961, eq. 4.
    """
    x = segments.without_padding(x, segment_ids)
    probabilities, chosen = _route(params, x, cfg)
    counts = jnp.ones((*x.shape[:2], 1), jnp.float32)
    if segment_ids is not None:
        counts = segments.real(segment_ids).astype(jnp.float32)[..., None]
    tokens = jnp.maximum(jnp.sum(counts), 1.0)
    uses = jnp.sum(jax.nn.one_hot(chosen, cfg.n_memories, dtype=jnp.float32), axis=2)
    share = jnp.sum(counts * uses, axis=(0, 1)) / tokens
    mean = jnp.sum(counts * probabilities, axis=(0, 1)) / tokens
    return cfg.balance_weight * cfg.n_memories * jnp.sum(share * mean)


def _rows(params, x_BT, chosen, cfg: Config, segment_ids=None):
    """Return the stream and, in its rows, q, k and v before convolution, beta and g.

    Queries are the same for all memories; each memory projects its own keys and values
    (eq. 4).
    """
    stream = routing.sort_by_memory(chosen, cfg.M, segment_ids)
    q = routing.to_rows(linear(x_BT, params["w_q"]), stream)
    x = routing.to_rows(x_BT, stream)

    def project(name):
        return grouped_linear(x, params[name], stream.sizes)

    beta = g = None
    if cfg.rule in DELTA_RULES:
        beta = jax.nn.sigmoid(project("w_beta").astype(jnp.float32))
    if cfg.rule in DECAYING_RULES:
        rate = decay_rate(params["a_log"])[None]
        bias = value(params["dt_bias"]).astype(jnp.float32)[None]
        g = -rate * jax.nn.softplus(project("w_decay").astype(jnp.float32) + bias)
    return stream, (q, project("w_k"), project("w_v")), beta, g


def _filters(params, cfg: Config):
    """Return the convolutions' filters for q, k and v, or none."""
    names = ("conv_q", "conv_k", "conv_v") if cfg.convolution else ()
    return [value(params[name]) for name in names]


def _heads(inputs, cfg: Config):
    """Activate q, k and v; split them into heads; normalise queries and keys."""
    q, k, v = (jax.nn.silu(a).reshape(a.shape[0], cfg.n_heads, -1) for a in inputs)
    return l2_normalize(q), l2_normalize(k), v


def _output(params, x, o_N, weights, stream):
    """Mix the memories (eq. 7), normalise each head, gate, project."""
    o = routing.to_choices(o_N, stream).astype(jnp.float32)
    o = jnp.sum(weights[..., None, None] * o, axis=2).astype(x.dtype)
    return gated_output(params, x, o)


@contract.forward
def forward(
    params: Any,
    x: Float[Array, "B T width"],
    cfg: Config,
    *,
    state: MoMState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T width"], MoMState | None]:
    """Run the parallel form; see `jaxlab.mixers` for the contract."""
    run = functools.partial(_forward, cfg=cfg)
    return over_batch_shards(run, params, (x, state, segment_ids))


def _forward(params, rows, cfg: Config):
    """Run all memories and batch rows as one stream."""
    x, state, segment_ids = rows
    chosen, weights = _memories(params, x, cfg)
    stream, inputs, beta, g = _rows(params, x, chosen, cfg, segment_ids)
    inputs, tails = list(inputs), []
    for i, filter_WD in enumerate(_filters(params, cfg)):
        tail = None if state is None else _by_sequence(state.tails[i])
        inputs[i], tail = routing.stream_convolution(inputs[i], filter_WD, stream, tail)
        tails.append(tail)
    q, k, v = _heads(inputs, cfg)
    if segment_ids is not None:  # a decay to zero forgets the document before
        g = jnp.zeros(q.shape[:2], jnp.float32) if g is None else g
        g = jnp.where(stream.resets[:, None], -jnp.inf, g)
    o, memory = _rule(
        jax.tree.map(lambda a: a[None], (q, k, v, beta, g)),
        initial_state=None if state is None else _by_sequence(state.memory),
        cu_seqlens=stream.cu_seqlens,
        chunk_size=cfg.chunk_size,
        implementation=cfg.implementation,
    )
    y = _output(params, x, o[0], weights, stream)
    if state is None:
        return y, None
    memory = jnp.where(stream.carries[:, None, None, None], memory, 0.0)

    def split(a):
        return a.reshape(cfg.M, len(x), *a.shape[1:])

    def by_batch(a):
        return jnp.swapaxes(split(a), 0, 1)

    return y, jax.tree.map(by_batch, MoMState(memory, tuple(tails)))


def _rule(operands, **settings):
    """Run the memories' recurrence: the delta rule if there is a beta."""
    q, k, v, beta, g = operands
    if beta is None:
        return pallas_kernels.gated_linear_attention(q, k, v, g, **settings)
    return pallas_kernels.delta_rule(q, k, v, beta, g, **settings)


def _by_sequence(a: Array) -> Array:
    """Turn [B, M, ...] into [S, ...], memories first."""
    return jnp.swapaxes(a, 0, 1).reshape(a.shape[0] * a.shape[1], *a.shape[2:])


@contract.step
def step(
    params: Any, x: Float[Array, "B width"], cfg: Config, state: MoMState
) -> tuple[Float[Array, "B width"], MoMState]:
    """Run the recurrence for one token, reading and writing only its k memories."""
    return over_batch_shards(functools.partial(_step, cfg=cfg), params, (x, state))


def _step(params, rows, cfg: Config):
    x, state = rows
    x_BT = x[:, None]
    chosen, weights = _memories(params, x_BT, cfg)
    stream, inputs, beta, g = _rows(params, x_BT, chosen, cfg)
    # The batch row and the memory of each row of the stream.
    place = stream.sequence % len(x), stream.sequence // len(x)
    inputs, tails = list(inputs), list(state.tails)
    for i, filter_WD in enumerate(_filters(params, cfg)):
        inputs[i], tail = convolution_step(inputs[i], filter_WD, tails[i][place])
        tails[i] = tails[i].at[place].set(tail)
    q, k, v = _heads(inputs, cfg)
    o, memory = _rule(
        jax.tree.map(lambda a: a[:, None], (q, k, v, beta, g)),
        initial_state=state.memory[place],
        implementation=cfg.implementation,
    )
    y = _output(params, x_BT, o[:, 0], weights, stream)
    return y[:, 0], MoMState(state.memory.at[place].set(memory), tuple(tails))
