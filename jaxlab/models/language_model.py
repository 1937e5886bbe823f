"""A language model: a repeating pattern of (mixer, feed-forward) blocks.

    x = embed(tokens)
    for each block:  x = x + mixer(norm(x));  x = x + swiglu(norm(x))
    logits = norm(x) W_head

The pattern repeats ``n_layers / len(pattern)`` times under one `jax.lax.scan`,
so compile time does not grow with depth; a hybrid is a longer pattern, for example
seven recurrent blocks and one of attention.

Dimension key: B batch, T time, d width, W vocabulary, L repeats of the pattern.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from jaxlab import params as p
from jaxlab.layers import rms_norm, swiglu, swiglu_spec
from jaxlab.mixers import MixerConfig, delta_product, mixer_of

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass keeps of a block: everything, matrix products, nothing."""


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """Sizes of a language model."""

    vocab_size: int = 264  # at least the tokenizer's; 257 for bytes, rounded up
    width: int = 256  # of the residual stream
    n_layers: int = 4  # a multiple of len(pattern)
    pattern: tuple[MixerConfig, ...] = (delta_product.Config(256),)  # mixers in order
    mlp_hidden: int | None = None  # None: 8/3 of the width, up to a multiple of 32
    tie_embeddings: bool = True  # the head is the embedding table transposed
    compute_dtype: str = "float32"  # of activations; parameters are float32
    remat: str = "none"  # what the backward pass keeps: none recomputed, dots, block
    norm_eps: float = 1e-6

    def __post_init__(self):
        for name in ("vocab_size", "width", "n_layers", "mlp_hidden"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"model.{name}={size} must be at least 1.")
        if not self.pattern:
            raise ValueError("pattern is empty; give at least one mixer's Config.")
        if self.n_layers % len(self.pattern):
            raise ValueError(
                f"n_layers={self.n_layers} is not a multiple of the pattern's "
                f"{len(self.pattern)} mixers; change one of them."
            )
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"compute_dtype={self.compute_dtype!r}; use 'float32' or 'bfloat16'."
            )
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} is not one of {sorted(REMAT)}.")
        # The model's width is the mixers' too: one number to change.
        pattern = tuple(dataclasses.replace(m, width=self.width) for m in self.pattern)
        object.__setattr__(self, "pattern", pattern)

    @property
    def hidden(self) -> int:
        return self.mlp_hidden or -(-8 * self.width // 3 // 32) * 32


def spec(cfg: LMConfig) -> dict[str, Any]:
    """Parameters: an embedding, the stacked blocks, a final norm, perhaps a head."""
    scale = p.ParamSpec((cfg.width,), (None,), initializers.ones, "scale")

    def block(mixer):
        return {
            "mixer_norm": scale,
            "mixer": mixer_of(mixer).spec(mixer),
            "mlp_norm": scale,
            "mlp": swiglu_spec(cfg.width, cfg.hidden),
        }

    pattern = {str(i): block(mixer) for i, mixer in enumerate(cfg.pattern)}
    specs = {
        "embedding": p.ParamSpec(
            (cfg.vocab_size, cfg.width),
            ("vocab", "width"),
            initializers.normal(cfg.width**-0.5),
            "embedding",
        ),
        "blocks": p.stack(pattern, cfg.n_layers // len(cfg.pattern)),
        "final_norm": scale,
    }
    if not cfg.tie_embeddings:
        specs["head"] = p.ParamSpec(
            (cfg.width, cfg.vocab_size), ("width", "vocab"), role="head"
        )
    return specs


def init(cfg: LMConfig, key: Array) -> dict[str, Any]:
    """Parameter arrays, float32."""
    return p.init(spec(cfg), key)


def init_state(cfg: LMConfig, batch: int, max_length: int) -> dict[str, Any]:
    """Every layer's state before the first token, stacked like the parameters.

    Args:
        cfg: the model.
        batch: how many sequences.
        max_length: tokens that attention layers keep; the others ignore it.
    """
    repeats = cfg.n_layers // len(cfg.pattern)
    dtype = jnp.dtype(cfg.compute_dtype)

    def stacked(mixer):
        state = mixer_of(mixer).init_state(mixer, batch, max_length, dtype)
        return jax.tree.map(
            lambda a: jnp.broadcast_to(a[None], (repeats, *a.shape)), state
        )

    return {str(i): stacked(mixer) for i, mixer in enumerate(cfg.pattern)}


def forward(
    params: Any,
    tokens: Int[Array, "B T"],
    cfg: LMConfig,
    *,
    state: Any = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T W"], Any]:
    """Logits of the token after each token.

    Args:
        params: from `init`, or any tree whose weights are `params` leaves.
        tokens: int ``[B, T]`` ids below `cfg.vocab_size`.
        cfg: the model.
        state: from `init_state` or an earlier call, to continue; None to start.
        segment_ids: documents of packed rows, see `jaxlab.mixers`.

    Returns:
        float32 logits ``[B, T, W]``, and the state after the last token (None where
        none was given).
    """
    mix = _mix_sequences(segment_ids)
    logits, state, _ = _run(params, tokens, cfg, state, mix)
    return logits, state


def forward_with_auxiliary_loss(
    params: Any,
    tokens: Int[Array, "B T"],
    cfg: LMConfig,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T W"], Float[Array, ""]]:
    """`forward` from the start, and the loss that the mixers add to the training loss.

    Returns:
        float32 logits ``[B, T, W]``, and the mean of `auxiliary_loss` over the layers
        whose mixer has one, float32; 0 where none has.
    """

    def loss(mixer, block, x):
        if not has_auxiliary_loss(mixer):
            return None
        return mixer_of(mixer).auxiliary_loss(block, x, mixer, segment_ids=segment_ids)

    mix = _mix_sequences(segment_ids)
    logits, _, losses = _run(params, tokens, cfg, None, mix, loss)
    losses = jax.tree.leaves(losses)  # [L] for each place in the pattern that has one
    mean = jnp.mean(jnp.stack(losses)) if losses else jnp.zeros((), jnp.float32)
    return logits, mean


def has_auxiliary_loss(mixer: MixerConfig) -> bool:
    """Whether the mixer adds a loss of its own."""
    return hasattr(mixer_of(mixer), "auxiliary_loss")


def step(
    params: Any, tokens: Int[Array, " B"], cfg: LMConfig, state: Any
) -> tuple[Float[Array, "B W"], Any]:
    """`forward` of one token a sequence, from `state`."""

    def mix(mixer, block, x, own_state):
        return mixer_of(mixer).step(block, x, mixer, own_state)

    logits, state, _ = _run(params, tokens, cfg, state, mix)
    return logits, state


def _mix_sequences(segment_ids):
    def mix(mixer, block, x, own_state):
        y, own_state = mixer_of(mixer).forward(
            block, x, mixer, state=own_state, segment_ids=segment_ids
        )
        return p.constrain(y, "batch", "time", None), own_state

    return mix


def _run(params, tokens, cfg: LMConfig, state, mix, loss=lambda *_: None):
    """The blocks, under a scan; `mix` runs one mixer on ``[B, T, d]`` or ``[B, d]``.

    Returns the logits, the states, and what `loss` makes of each mixer's input.
    """
    x = p.embed(params["embedding"], tokens, jnp.dtype(cfg.compute_dtype))

    def repeat(x, layer):
        blocks, states = layer
        new_states = None if states is None else {}
        losses = {}
        for i, mixer in enumerate(cfg.pattern):
            block = blocks[str(i)]
            own_state = None if states is None else states[str(i)]
            normed = rms_norm(x, p.value(block["mixer_norm"]), cfg.norm_eps)
            y, own_state = mix(mixer, block["mixer"], normed, own_state)
            losses[str(i)] = loss(mixer, block["mixer"], normed)
            x = x + y
            normed = rms_norm(x, p.value(block["mlp_norm"]), cfg.norm_eps)
            x = x + swiglu(block["mlp"], normed)
            if new_states is not None:
                new_states[str(i)] = own_state
        return x, (new_states, losses)

    if cfg.remat != "none":
        repeat = jax.checkpoint(repeat, policy=REMAT[cfg.remat], prevent_cse=False)
    x, (state, losses) = jax.lax.scan(repeat, x, (params["blocks"], state))
    x = rms_norm(x, p.value(params["final_norm"]), cfg.norm_eps)
    if cfg.tie_embeddings:
        logits = p.linear_t(x, params["embedding"])
    else:
        logits = p.linear(x, params["head"])
    return logits.astype(jnp.float32), state, losses
