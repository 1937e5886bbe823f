"""EGG: a recurrent language model of integers, which only a search can train.

Weights and activations are int8 in -127 .. 127 and stand for sixteenths (16 is 1.0);
sums are int32. Every operation rounds to negative infinity (``>>`` and ``//``) and
saturates, so the model has no derivative, and needs none: `strategy` moves its weights
by the signs of differences of its loss.

    x <- x + cell(norm(x)),   x <- x + (norm(x) W_up) W_down,   logits = norm(x) W_head

Saturation is the only nonlinearity outside the cell. As elsewhere in this library a
weight knows how to multiply: `linear`, `embed` and `vector` take int8 arrays and
`Perturbed` ones, and the model never asks which it holds.

Dimension key: B batch, T time, D width, L layers, V vocabulary.

Differs from the paper in: the logarithm of the loss counts leading zeros and compares
with 16 constants in the place of a table of 2^28 entries, and rounds to the nearest;
documents part at `Config.separator`, not at byte 0; norms divide, without a table.

Reference: Sarkar et al., Evolution Strategies at the Hyperscale, arXiv 2511.16652,
appendices on integer training.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int, Int8, Int32

from jaxlab.params import ParamSpec, stack

FIXED_POINT = 4  # bits after the point
ONE = 2**FIXED_POINT
LARGEST = 127  # -128 is never used, because it has no opposite
WIDEST = 1024  # 4 D * 127 * 63^2 must fit int32: see `linear`
MOST_IDS = 2048  # the sum of so many powers of two fits int32: see `loss`

Weight = Any  # an int8 array, or Perturbed


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model.

    Attributes:
        width: D, a power of 4, so that the square root of every fan-in is a shift.
        layers: L.
        vocab_size: V.
        separator: the id that starts a document; before it the state is forgotten.
            The default is that of byte tokens.
    """

    width: int = 64
    layers: int = 1
    vocab_size: int = 257
    separator: int = 256

    def __post_init__(self):
        if self.width not in (powers := (4, 16, 64, 256, WIDEST)):
            raise ValueError(
                f"width is {self.width}, but must be a power of 4 so that dividing by "
                "the square root of a fan-in is a shift, and small enough for sums of "
                f"32 bits: one of {powers}."
            )
        if self.layers < 1:
            raise ValueError(f"layers is {self.layers}, but must be at least 1.")
        if not 2 <= self.vocab_size <= MOST_IDS:
            raise ValueError(
                f"vocab_size is {self.vocab_size}, but must be 2 to {MOST_IDS}: the "
                "loss sums as many powers of two in 32 bits."
            )
        if not 0 <= self.separator < self.vocab_size:
            raise ValueError(
                f"separator is {self.separator}, but the ids of a vocabulary of "
                f"{self.vocab_size} are 0 to {self.vocab_size - 1}; name one of them."
            )


def spec(cfg: Config) -> dict[str, Any]:
    """Declare the parameters: 2 V D + D + L (12 D^2 + 4 D) numbers of int8."""
    D, V = cfg.width, cfg.vocab_size

    def normal(n_in, n_out, role="matrix"):
        return ParamSpec((n_in, n_out), (None, None), _normal, role, jnp.int8)

    def constant(number, role):
        init = jax.nn.initializers.constant(number)
        return ParamSpec((D,), (None,), init, role, jnp.int8)

    block = {
        "norm_1": constant(ONE, "scale"),
        "cell": {
            **{name: normal(D, D) for name in ("w_f", "u_f", "w_h", "u_h")},
            **{name: constant(0, "bias") for name in ("b_f", "b_h")},
        },
        "norm_2": constant(ONE, "scale"),
        "up": normal(D, 4 * D),
        "down": normal(4 * D, D),
    }
    return {
        "embedding": normal(V, D, "embedding"),
        "blocks": stack(block, cfg.layers),
        "norm": constant(ONE, "scale"),
        "head": normal(D, V, "head"),
    }


def _normal(key, shape, dtype):
    """Draw round(16 N(0, 1)), clipped to int8."""
    x = jnp.round(ONE * jax.random.normal(key, shape))
    return jnp.clip(x, -LARGEST, LARGEST).astype(dtype)


def init_state(cfg: Config, batch: int) -> Int8[Array, "L B D"]:
    """Return the states of the cells before a document, which are zeros."""
    return jnp.zeros((cfg.layers, batch, cfg.width), jnp.int8)


# Weights ------------------------------------------------------------------------------


@struct.dataclass
class Perturbed:
    """A weight with the noise of one member of a population.

    The noise of a matrix is the product of a column `a` and a row `b`, added to the sum
    of a product before its division; that of a vector is the entries' product.

    Attributes:
        w: int8 ``[in, out]``, or ``[D]``.
        a: int8 ``[in]``, or ``[D]``; includes the member's sign.
        b: int8 ``[out]``, or ``[D]``.
        shift: the noise is divided by 2^shift.
    """

    w: Int8[Array, "..."]
    a: Int8[Array, "..."]
    b: Int8[Array, "..."]
    shift: int = struct.field(pytree_node=False)


def saturate(x: Int[Array, "..."]) -> Int8[Array, "..."]:
    """Clip to -127 .. 127."""
    return jnp.clip(x, -LARGEST, LARGEST).astype(jnp.int8)


def linear(u: Int8[Array, "*rows in"], w: Weight) -> Int8[Array, "*rows out"]:
    """Return ``sat((u W + ((u a) b >> shift)) >> (4 + log2 sqrt in))``.

    A population shares u W. Noise is at most 63, which keeps (u a) b in 32 bits.
    """
    if isinstance(w, Perturbed):
        noise = _dot(u, w.a)[..., None] * _row(w.b, u.ndim) >> w.shift
        total = _dot(u, w.w) + noise
    else:
        total = _dot(u, w)
    return saturate(total >> FIXED_POINT + _log2(u.shape[-1]) // 2)


def embed(w: Weight, ids: Int32[Array, "*rows"]) -> Int8[Array, "*rows out"]:
    """Return rows of a table, ``sat(W[t] + (a[t] b >> shift))``."""
    if isinstance(w, Perturbed):
        noise = _wide(w.a[ids])[..., None] * _row(w.b, ids.ndim + 1) >> w.shift
        return saturate(_wide(w.w[ids]) + noise)
    return w[ids]


def vector(w: Weight) -> Int8[Array, "*stack D"]:
    """Return a scale or a bias, ``sat(w + (a b >> shift))``."""
    if isinstance(w, Perturbed):
        return saturate(_wide(w.w) + (_wide(w.a) * _wide(w.b) >> w.shift))
    return w


def _dot(u, w):
    """Sum int8 products over the last axis of u and the first of w, in int32."""
    axes = (((u.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(u, w, axes, preferred_element_type=jnp.int32)


def _wide(x):
    return x.astype(jnp.int32)


def _row(v, ndim):
    """Return a vector as int32, with axes to broadcast with `ndim` of activations."""
    return _wide(v).reshape((1,) * (ndim - 1) + (-1,))


def _log2(n: int) -> int:
    return n.bit_length() - 1


# Layers -------------------------------------------------------------------------------


def forward(
    params: Any,
    tokens: Int32[Array, "B T"],
    cfg: Config,
    state: Int8[Array, "L B D"],
) -> tuple[Int8[Array, "B T V"], Int8[Array, "L B D"]]:
    """Return logits in sixteenths of a bit, and the states after the last token.

    A text gives the same whole or in segments, each with the state of the one before.
    A separator is read from the state of zeros.

    Args:
        params: tree of `spec`, with int8 arrays or `Perturbed` leaves.
        tokens: ids.
        cfg: sizes.
        state: from `init_state` or from the segment before.
    """
    starts_BT = tokens == cfg.separator

    def block(x, layer):
        w, s = layer
        y, s = _cell(w["cell"], layer_norm(x, w["norm_1"]), starts_BT, s)
        x = _add(x, y)
        y = linear(linear(layer_norm(x, w["norm_2"]), w["up"]), w["down"])
        return _add(x, y), s

    x_BTD = embed(params["embedding"], tokens)
    x_BTD, state = jax.lax.scan(block, x_BTD, (params["blocks"], state))
    return linear(layer_norm(x_BTD, params["norm"]), params["head"]), state


def layer_norm(x: Int8[Array, "*rows D"], w: Weight) -> Int8[Array, "*rows D"]:
    """Return ``sat(x w // max(1, sum|x| // D))``, x over its mean absolute value."""
    mean = jnp.sum(jnp.abs(_wide(x)), -1, keepdims=True) >> _log2(x.shape[-1])
    return saturate(_wide(x) * _row(vector(w), x.ndim) // jnp.maximum(mean, 1))


def _cell(
    w: Any,
    x: Int8[Array, "B T D"],
    starts: Bool[Array, "B T"],
    state: Int8[Array, "B D"],
) -> tuple[Int8[Array, "B T D"], Int8[Array, "B D"]]:
    """Run the recurrence, a minimal gated unit whose gate is (f + 127) / 256.

    f  = sat(x W_f + s U_f + b_f)
    h  = sat(x W_h + ((f + 127) s >> 8) U_h + b_h)
    s' = s + ((f + 127) (h - s) >> 8)
    """
    # What depends on the input alone is computed for all tokens at once.
    f_BTD, h_BTD = (
        _wide(linear(x, w[f"w_{name}"])) + _row(vector(w[f"b_{name}"]), x.ndim)
        for name in "fh"
    )

    def token(s, now):
        start_B, f, h = now
        s = jnp.where(start_B[:, None], jnp.int8(0), s)
        gate = _wide(_add(f, linear(s, w["u_f"]))) + LARGEST
        kept = (gate * _wide(s) >> 8).astype(jnp.int8)
        h = _add(h, linear(kept, w["u_h"]))
        change = gate * (_wide(h) - _wide(s)) >> 8
        s = (_wide(s) + change).astype(jnp.int8)  # between s and h
        return s, s

    in_time = jax.tree.map(lambda x: x.swapaxes(0, 1), (starts, f_BTD, h_BTD))
    state, s_TBD = jax.lax.scan(token, state, in_time)
    return s_TBD.swapaxes(0, 1), state


def _add(x, y):
    return saturate(_wide(x) + _wide(y))


# Loss ---------------------------------------------------------------------------------

EXP2 = np.floor(ONE * 2 ** (np.arange(256) / ONE)).astype(np.int32)
"""16 * 2^(k / 16)."""

_STEPS = np.ceil(2 ** (31 + (np.arange(1, 17) - 0.5) / 16)).astype(np.uint32)
"""The numbers in 2^31 .. 2^32 from which log2 is nearer to the next sixteenth."""


def log2(x: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """Return 16 log2(x) to the nearest integer, for x of at least 1."""
    zeros = jax.lax.clz(x)
    normed = x.astype(jnp.uint32) << zeros.astype(jnp.uint32)
    above = [(normed >= step).astype(jnp.int32) for step in _STEPS]
    return ONE * (31 - zeros) + sum(above)


def loss(
    logits: Int8[Array, "*rows V"], targets: Int32[Array, "*rows"]
) -> Int32[Array, "*rows"]:
    """Return -log2 p(target) in sixteenths of a bit; p is softmax to the base 2^(1/16).

    It is log2(sum_k EXP2[z_k]) - 64 - z_target with z = logits + 128; the 64 cancels
    the factor 16 in EXP2.
    """
    z = _wide(logits) + 128
    total = jnp.sum(jnp.asarray(EXP2)[z], -1)
    z_target = jnp.take_along_axis(z, targets[..., None], -1)[..., 0]
    return log2(total) - ONE * FIXED_POINT - z_target


def segment_loss(
    params: Any,
    tokens: Int32[Array, "B T+1"],
    cfg: Config,
    state: Int8[Array, "L B D"],
) -> tuple[Int32[Array, " B"], Int8[Array, "L B D"]]:
    """Return the sum of losses of a segment's T predictions, and its last state.

    An opening separator after a closing one is not text and does not count.
    """
    logits, state = forward(params, tokens[:, :-1], cfg, state)
    losses = loss(logits, tokens[:, 1:])
    border = (tokens == cfg.separator)[:, :-1] & (tokens == cfg.separator)[:, 1:]
    return jnp.sum(jnp.where(border, 0, losses), -1), state


def bits(sixteenths: Int[np.ndarray, "..."] | int) -> float:
    """Return the sum of losses in bits, a float; not for the training step."""
    return float(np.sum(np.asarray(sixteenths, np.int64))) / ONE
