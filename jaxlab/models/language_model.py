"""A language model: a repeating pattern of (mixer, feed-forward) blocks.

    x = embed(tokens)
    for each block:  x = x + mixer(norm(x));  x = x + feedforward(norm(x))
    logits = norm(x) W_head

`forward` is `hidden`, which ends with the last norm, followed by `logits`. The pattern
repeats ``n_layers / len(pattern)`` times under one `jax.lax.scan`, so compile time does
not grow with depth; a hybrid is a longer pattern, for example seven recurrent blocks
and one attention block.

Dimension key: B batch, T time, d width, W vocabulary, L repeats of the pattern.
"""

import dataclasses
import functools
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from jaxlab import params as p
from jaxlab.feedforward import feedforward_of, swiglu
from jaxlab.layers import rms_norm
from jaxlab.layers.contract import module_of
from jaxlab.mixers import delta_product, mixer_of
from pallas_kernels.arguments import known

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}
"""Policies for what the backward pass keeps of a block: all, its products, nothing."""


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """Sizes of a language model."""

    vocab_size: int = 264  # at least the tokenizer's; 257 for bytes, rounded up
    width: int = 256  # size of the residual stream
    n_layers: int = 4  # a multiple of len(pattern)
    pattern: tuple[Any, ...] = (delta_product.Config(256),)  # mixers in order
    feedforward: Any = swiglu.Config(256)  # the layer after every mixer
    mlp_hidden: int | None = None  # sets feedforward.hidden, then becomes None
    tie_embeddings: bool = True  # the head is the embedding table transposed
    compute_dtype: str = "float32"  # dtype of activations; parameters are float32
    remat: str = "none"  # recompute nothing, all but products ("dots") or the "block"
    norm_eps: float = 1e-6

    def __post_init__(self):
        for name in ("vocab_size", "width", "n_layers", "mlp_hidden"):
            size = getattr(self, name)
            if size is not None or name != "mlp_hidden":
                check_count(name, size)
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
        for mixer in self.pattern:
            mixer_of(mixer)
        feedforward_of(self.feedforward)
        # The layers take the model's width, so that it is set in one place.
        pattern = tuple(dataclasses.replace(m, width=self.width) for m in self.pattern)
        feedforward = dataclasses.replace(self.feedforward, width=self.width)
        if self.mlp_hidden is not None:
            if not hasattr(feedforward, "hidden"):
                raise ValueError(
                    f"mlp_hidden={self.mlp_hidden} is the size of a feed-forward layer "
                    f"with a field `hidden`, but feedforward is {feedforward!r}; set "
                    "its sizes there."
                )
            feedforward = dataclasses.replace(feedforward, hidden=self.mlp_hidden)
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "feedforward", feedforward)
        object.__setattr__(self, "mlp_hidden", None)


def spec(cfg: LMConfig) -> dict[str, Any]:
    """Specs: an embedding, the stacked blocks, a final norm and, if untied, a head."""
    scale = p.ParamSpec((cfg.width,), (None,), initializers.ones, "scale")

    def block(mixer):
        return {
            "mixer_norm": scale,
            "mixer": mixer_of(mixer).spec(mixer),
            "mlp_norm": scale,
            "mlp": feedforward_of(cfg.feedforward).spec(cfg.feedforward),
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
    """The state of every layer before the first token, stacked like the parameters.

    Args:
        cfg: the model.
        batch: number of sequences.
        max_length: tokens that attention layers keep; other layers ignore it.

    Raises:
        TypeError: a number is not whole.
        ValueError: `batch` is below 1, or `max_length` below 0.
    """
    check_count("batch", batch)
    check_count("max_length", max_length, least=0)
    repeats = cfg.n_layers // len(cfg.pattern)
    dtype = jnp.dtype(cfg.compute_dtype)

    def stacked(mixer):
        state = mixer_of(mixer).init_state(mixer, batch, max_length, dtype)
        return jax.tree.map(
            lambda a: jnp.broadcast_to(a[None], (repeats, *a.shape)), state
        )

    return {str(i): stacked(mixer) for i, mixer in enumerate(cfg.pattern)}


def hidden(
    params: Any,
    tokens: Int[Array, "B T"],
    cfg: LMConfig,
    *,
    state: Any = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T d"], Any]:
    """The hidden state after each token: the normalised output of the last block.

    Args:
        params: from `init`, or any tree whose weights are `jaxlab.params` leaves.
        tokens: int ``[B, T]`` ids below `cfg.vocab_size`.
        cfg: the model.
        state: from `init_state` or an earlier call, to continue; None to start.
        segment_ids: documents of packed rows, see `jaxlab.mixers`.

    Returns:
        ``[B, T, d]`` of `cfg.compute_dtype`, for `logits`, and the state after the last
        token (None if none was given).

    Raises:
        TypeError: the tokens are no array of integers.
        ValueError: an id is outside the vocabulary (where it is known: not traced, and
            no padding), or shapes, the parameters or the state do not fit the model.
    """
    check_tokens(tokens, cfg, segment_ids=segment_ids)
    x, state, _ = _run(params, tokens, cfg, state, _mix_sequences(segment_ids))
    return x, state


def hidden_with_auxiliary_loss(
    params: Any,
    tokens: Int[Array, "B T"],
    cfg: LMConfig,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T d"], Float[Array, ""]]:
    """`hidden` without a state, and the loss that layers add to the training loss.

    Returns:
        The hidden states ``[B, T, d]``, and a float32 scalar: the mean of
        `auxiliary_loss` over the layers whose mixer has one, plus its mean over the
        feed-forward layers, if they have one; 0 if no layer has.

    Raises:
        As `hidden`.
    """
    check_tokens(tokens, cfg, segment_ids=segment_ids)

    def mixer_loss(mixer, block, x):
        if has_auxiliary_loss(mixer):
            auxiliary_loss = mixer_of(mixer).auxiliary_loss
            return auxiliary_loss(block, x, mixer, segment_ids=segment_ids)

    def feedforward_loss(block, x):
        if has_auxiliary_loss(cfg.feedforward):
            auxiliary_loss = feedforward_of(cfg.feedforward).auxiliary_loss
            return auxiliary_loss(block, x, cfg.feedforward, segment_ids=segment_ids)

    mix = _mix_sequences(segment_ids)
    losses = mixer_loss, feedforward_loss
    x, _, losses = _run(params, tokens, cfg, None, mix, losses)
    total = jnp.zeros((), jnp.float32)
    for kind in losses:  # an array [L] for each place in the pattern with such a loss
        if arrays := jax.tree.leaves(kind):
            total += jnp.mean(jnp.stack(arrays))
    return x, total


def logits(
    params: Any, x: Float[Array, "*rows d"], cfg: LMConfig
) -> Float[Array, "*rows W"]:
    """Logits of the next token from hidden states.

    Args:
        params: the model's parameters.
        x: ``[..., d]`` from `hidden`.
        cfg: the model.

    Returns:
        float32 ``[..., W]``.

    Raises:
        TypeError: x are no floating-point numbers.
        ValueError: x has another width.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"x has dtype {x.dtype}, but the hidden states are floating-point numbers."
        )
    if x.shape[-1:] != (cfg.width,):
        raise ValueError(
            f"x has shape {x.shape}, but the hidden states of this model are [..., "
            f"width={cfg.width}]."
        )
    if cfg.tie_embeddings:
        y = p.linear_t(x, params["embedding"])
    else:
        y = p.linear(x, params["head"])
    return y.astype(jnp.float32)


def forward(
    params: Any,
    tokens: Int[Array, "B T"],
    cfg: LMConfig,
    *,
    state: Any = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T W"], Any]:
    """Logits of the token after each token: `logits` of `hidden`.

    Args:
        params, tokens, cfg, state, segment_ids: as for `hidden`.

    Returns:
        float32 logits ``[B, T, W]``, and the state after the last token (None if none
        was given).
    """
    x, state = hidden(params, tokens, cfg, state=state, segment_ids=segment_ids)
    return logits(params, x, cfg), state


def forward_with_auxiliary_loss(
    params: Any,
    tokens: Int[Array, "B T"],
    cfg: LMConfig,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T W"], Float[Array, ""]]:
    """`forward` without a state, and the loss that layers add to the training loss.

    Returns:
        float32 logits ``[B, T, W]``, and the loss of `hidden_with_auxiliary_loss`.
    """
    x, loss = hidden_with_auxiliary_loss(params, tokens, cfg, segment_ids=segment_ids)
    return logits(params, x, cfg), loss


def has_auxiliary_loss(cfg: Any) -> bool:
    """Whether a layer adds to the training loss; for an LMConfig, whether any does.

    Args:
        cfg: a mixer's or a feed-forward layer's Config, or the model's.
    """
    if isinstance(cfg, LMConfig):
        return any(map(has_auxiliary_loss, (*cfg.pattern, cfg.feedforward)))
    return hasattr(module_of(cfg, ("spec", "forward"), "layer"), "auxiliary_loss")


def step(
    params: Any, tokens: Int[Array, " B"], cfg: LMConfig, state: Any
) -> tuple[Float[Array, "B W"], Any]:
    """`forward` for one token per sequence, from `state`."""
    x, state = hidden_step(params, tokens, cfg, state)
    return logits(params, x, cfg), state


def hidden_step(
    params: Any, tokens: Int[Array, " B"], cfg: LMConfig, state: Any
) -> tuple[Float[Array, "B d"], Any]:
    """`hidden` for one token per sequence, from `state`."""
    check_tokens(tokens, cfg, axes=("batch",))
    if state is None:
        raise ValueError(
            "A step needs a state, but it is None; begin with models.init_state(cfg, "
            f"{tokens.shape[0]}, max_length)."
        )

    def mix(mixer, block, x, layer_state):
        return mixer_of(mixer).step(block, x, mixer, layer_state)

    x, state, _ = _run(params, tokens, cfg, state, mix)
    return x, state


def check_tokens(
    tokens: Any,
    cfg: LMConfig,
    *,
    axes: tuple[str, ...] = ("batch", "time"),
    name: str = "tokens",
    segment_ids: Any = None,
) -> None:
    """Refuse tokens that are no ids of the model's vocabulary, as far as is known.

    Args:
        tokens: the ids.
        cfg: the model.
        axes: the names of their axes.
        name: of the tokens, for the message.
        segment_ids: below 0 for padding, whose ids may be any; None without padding.

    Raises:
        TypeError: they are no array of integers.
        ValueError: they have other axes, or an id is known, that is not traced, and
            outside the vocabulary; names the first such id and its place.
    """
    if not isinstance(tokens, jax.Array | np.ndarray):
        raise TypeError(
            f"{name} is of type {type(tokens).__name__}, but must be an array of "
            f"integers [{', '.join(axes)}]; jnp.asarray makes one of a list."
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(
            f"{name} has dtype {tokens.dtype}, but must hold integers, the ids of "
            "tokens."
        )
    if tokens.ndim != len(axes):
        raise ValueError(
            f"{name} has shape {tokens.shape}, but must have the axes "
            f"[{', '.join(axes)}]."
        )
    ids, segments = known(tokens), 0 if segment_ids is None else known(segment_ids)
    if ids is None or segments is None:
        return
    wrong = (ids < 0) | (ids >= cfg.vocab_size)
    if np.shape(segments) == ids.shape:  # the layers refuse other shapes
        wrong &= np.asarray(segments) >= 0
    if wrong.any():
        place = np.argwhere(wrong)[0].tolist()
        raise ValueError(
            f"{name}{place} is {ids[tuple(place)]}, but the model's ids are 0 to "
            f"{cfg.vocab_size - 1}; encode with the tokenizer that it was trained "
            "with, or give padding a segment id below 0."
        )


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse all but a whole number from `least` on.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is below `least`.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be a whole number, at least {least}.")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")


def _check_weights(params, cfg: LMConfig) -> None:
    """Check the model's own weights, by name and shape; the layers check theirs."""
    repeats = cfg.n_layers // len(cfg.pattern)
    shapes = {"embedding": (cfg.vocab_size, cfg.width), "final_norm": (cfg.width,)}
    if not cfg.tie_embeddings:
        shapes["head"] = (cfg.width, cfg.vocab_size)
    for i in range(len(cfg.pattern)):
        shapes[f"blocks/{i}/mixer_norm"] = (repeats, cfg.width)
    for path, shape in shapes.items():
        weight = params
        for key in path.split("/"):
            if not isinstance(weight, Mapping) or key not in weight:
                raise ValueError(
                    f"The parameters have no {path!r}, which the model has with these "
                    "settings; draw them by models.init(cfg, key)."
                )
            weight = weight[key]
        given = getattr(weight, "shape", shape)
        if given != shape:
            raise ValueError(
                f"The weight {path!r} has shape {given}, but the model needs {shape}; "
                "give it the config with which the parameters were made."
            )


def _check_state(state, cfg: LMConfig) -> None:
    """Check that the state is of as many layers; the layers check theirs."""
    if state is None:
        return
    places = {str(i) for i in range(len(cfg.pattern))}
    repeats = cfg.n_layers // len(cfg.pattern)
    if (
        not isinstance(state, Mapping)
        or set(state) != places
        or any(x.shape[:1] != (repeats,) for x in jax.tree.leaves(state))
    ):
        raise ValueError(
            f"The state is not one of {cfg.n_layers} layers in a pattern of "
            f"{len(places)}; make one with models.init_state(cfg, batch, max_length)."
        )


def _mix_sequences(segment_ids):
    def mix(mixer, block, x, layer_state):
        y, layer_state = mixer_of(mixer).forward(
            block, x, mixer, state=layer_state, segment_ids=segment_ids
        )
        return p.constrain(y, "batch", "time", None), layer_state

    return mix


def _no_loss(*_):
    return None


def _run(params, tokens, cfg: LMConfig, state, mix, losses=(_no_loss, _no_loss)):
    """Scan over the blocks; `mix` runs one mixer on ``[B, T, d]`` or ``[B, d]``.

    Returns the hidden states, the layers' states, and two trees: the first of `losses`
    at the input of each mixer, the second at that of each feed-forward layer.
    """
    _check_weights(params, cfg)
    _check_state(state, cfg)
    mixer_loss, feedforward_loss = losses
    feedforward = functools.partial(
        feedforward_of(cfg.feedforward).forward, cfg=cfg.feedforward
    )
    x = p.embed(params["embedding"], tokens, jnp.dtype(cfg.compute_dtype))

    def repeat(x, layer):
        blocks, states = layer
        new_states = None if states is None else {}
        mixer_losses, feedforward_losses = {}, {}
        for i, mixer in enumerate(cfg.pattern):
            block = blocks[str(i)]
            layer_state = None if states is None else states[str(i)]
            normed = rms_norm(x, p.value(block["mixer_norm"]), cfg.norm_eps)
            y, layer_state = mix(mixer, block["mixer"], normed, layer_state)
            mixer_losses[str(i)] = mixer_loss(mixer, block["mixer"], normed)
            x = x + y
            normed = rms_norm(x, p.value(block["mlp_norm"]), cfg.norm_eps)
            feedforward_losses[str(i)] = feedforward_loss(block["mlp"], normed)
            x = x + feedforward(block["mlp"], normed)
            if new_states is not None:
                new_states[str(i)] = layer_state
        return x, (new_states, (mixer_losses, feedforward_losses))

    if cfg.remat != "none":
        repeat = jax.checkpoint(repeat, policy=REMAT[cfg.remat], prevent_cse=False)
    x, (state, losses) = jax.lax.scan(repeat, x, (params["blocks"], state))
    return rms_norm(x, p.value(params["final_norm"]), cfg.norm_eps), state, losses
