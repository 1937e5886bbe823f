"""A weight knows how to multiply.

Models use weights only through `linear`, `linear_t`, `grouped_linear`, `embed` and
`value`. A weight is an array ``[in, out]`` or one of the structured leaves below, which
nest, so every model works with all of them and never asks which it holds:

- `LowRank(w, a, b, scale)`: ``w + scale a b^T`` without forming the sum (a member of an
  evolution strategy's population, or an adapter).
- `Quantized(q, scale)`: ``q * scale``, int8 with one scale an output channel.
- `Tapped(w, tap)`: ``w``; the gradient with respect to `tap` is not a derivative but
  the statistics of the product (what Kronecker-factored optimizers need).

Stacked layers add leading axes to every array and `jax.lax.scan` peels them off.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxlab.params.grouped import group_of_rows, grouped_matmul

Weight = Any  # an array, or a leaf below


class _NotAnArray:
    """Refuses the conversions that would silently drop a leaf's structure."""

    def _refuse(self, *_args, **_kwargs):
        raise TypeError(
            f"{type(self).__name__} is a structured weight, not an array: multiply "
            "with linear(x, w), linear_t(x, w) or embed(w, ids), or materialise it "
            "with value(w)."
        )

    __array__ = __jax_array__ = _refuse


@struct.dataclass
class LowRank(_NotAnArray):
    """The weight ``w + scale a b^T``, never formed: ``x w + scale (x a) b^T``.

    Attributes:
        w: base weight ``[in, out]``, any leaf.
        a: ``[in, rank]``.
        b: ``[out, rank]``.
        scale: float32, one number a weight, so that weights may share a and b; None for
            1.

    Reference: "Evolution Strategies at the Hyperscale", arXiv 2511.16652.
    """

    w: Weight
    a: Float[Array, "*stack in rank"]
    b: Float[Array, "*stack out rank"]
    scale: Float[Array, "*stack"] | None = None


@struct.dataclass
class Quantized(_NotAnArray):
    """The weight ``q * scale`` with int8 `q`; it has no gradient.

    Attributes:
        q: int8 ``[in, out]``.
        scale: float32 ``[1, out]``, one step size an output channel.
    """

    q: Int[Array, "*stack in out"]
    scale: Float[Array, "*stack 1 out"]


@struct.dataclass
class Tap:
    """Sums over the rows of one or more products ``y = x w``.

    A row on which the loss does not depend, such as padding, is not summed: it is known
    by the gradient of its output, which is all zeros.

    Attributes:
        a: float32 ``[in]``, sum of the vectors on the weight's input side.
        g: float32 ``[out]``, sum of the vectors on its output side.
        rows: float32 scalar, how many rows were summed.

    For `linear` and `embed`, `a` sums inputs (one-hot for `embed`) and `g` sums
    gradients of outputs; for `linear_t` it is the other way round.
    """

    a: Float[Array, "*stack in"]
    g: Float[Array, "*stack out"]
    rows: Float[Array, "*stack"]


@struct.dataclass
class Tapped(_NotAnArray):
    """The weight `w` whose products report their statistics as the gradient of `tap`.

    One `jax.grad` gives the gradients and the statistics; the sums add over reuse of
    the weight, scan steps and accumulated batches.

    Attributes:
        w: the weight ``[in, out]``, any leaf.
        tap: a `Tap` of zeros from `tapped`.
    """

    w: Weight
    tap: Tap


def quantize(w: Float[Array, "*stack in out"]) -> Quantized:
    """Round to int8 with the largest absolute value of each output channel as 127."""
    largest = jnp.max(jnp.abs(w), axis=-2, keepdims=True).astype(jnp.float32)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    q = jnp.round(w.astype(jnp.float32) / scale).astype(jnp.int8)
    return Quantized(q, scale)


def tapped(w: Weight) -> Tapped:
    """`w` with a fresh tap."""
    *stack, n_in, n_out = jax.eval_shape(value, w).shape
    zeros = lambda *shape: jnp.zeros((*stack, *shape), jnp.float32)  # noqa: E731
    return Tapped(w, Tap(a=zeros(n_in), g=zeros(n_out), rows=zeros()))


def tap(tree: Any, where: Any) -> Any:
    """The tree with fresh taps on its weights.

    Args:
        tree: parameters.
        where: tree of booleans, one a weight, such as `select` gives.
    """
    return jax.tree.map(lambda tap, w: tapped(w) if tap else w, where, tree)


def untap(tree: Any) -> tuple[Any, Any]:
    """A tree of weights or of gradients without taps; and the taps, None elsewhere."""
    is_tapped = lambda w: isinstance(w, Tapped)  # noqa: E731

    def split(part):
        return jax.tree.map(part, tree, is_leaf=is_tapped)

    return (
        split(lambda w: w.w if is_tapped(w) else w),
        split(lambda w: w.tap if is_tapped(w) else None),
    )


def divided_taps(taps: Any, by: Array) -> Any:
    """Taps of a loss that is divided by a number: gradients are, inputs are not."""
    is_tap = lambda x: isinstance(x, Tap)  # noqa: E731
    return jax.tree.map(
        lambda tap: Tap(tap.a, tap.g / by, tap.rows), taps, is_leaf=is_tap
    )


def linear(x: Float[Array, "*rows in"], w: Weight) -> Float[Array, "*rows out"]:
    """``x w`` in the dtype of `x`."""
    match w:
        case LowRank():
            return linear(x, w.w) + linear_t(_scaled(linear(x, w.a), w.scale), w.b)
        case Quantized():
            return (x @ w.q.astype(x.dtype)) * _row(w.scale, x)
        case Tapped():
            return _tap(linear, _linear_sides, x, w.w, w.tap)
        case _:
            return x @ w.astype(x.dtype)


def linear_t(x: Float[Array, "*rows out"], w: Weight) -> Float[Array, "*rows in"]:
    """``x w^T`` in the dtype of `x` (a tied head: `w` is the embedding table)."""
    match w:
        case LowRank():
            return linear_t(x, w.w) + linear_t(_scaled(linear(x, w.b), w.scale), w.a)
        case Quantized():
            return (x * _row(w.scale, x)) @ w.q.astype(x.dtype).mT
        case Tapped():
            return _tap(linear_t, _linear_t_sides, x, w.w, w.tap)
        case _:
            return x @ w.astype(x.dtype).mT


def grouped_linear(
    x: Float[Array, "N in"], w: Weight, sizes: Int[Array, " M"]
) -> Float[Array, "N out"]:
    """``y_n = x_n w_m`` for the rows n of group m, in the dtype of `x`.

    Args:
        x: rows, those of a group behind one another, groups in order.
        w: M weights, stacked.
        sizes: rows a group, summing to at most N; the rows left over give 0.
    """
    match w:
        case LowRank():
            inner = grouped_linear(x, _scaled_columns(w), sizes)
            return grouped_linear(x, w.w, sizes) + grouped_linear(inner, w.b.mT, sizes)
        case Quantized():
            return grouped_matmul(x, value(w).astype(x.dtype), sizes)
        case Tapped():
            return _tap(_grouped, _grouped_sides, (x, sizes), w.w, w.tap)
        case _:
            return grouped_matmul(x, w.astype(x.dtype), sizes)


def embed(
    w: Weight, ids: Int[Array, "*rows"], dtype: Any = jnp.float32
) -> Float[Array, "*rows out"]:
    """Rows `ids` of the table `w` ``[in, out]``, in `dtype`."""
    match w:
        case LowRank():
            inner = _scaled(embed(w.a, ids, dtype), w.scale)
            return embed(w.w, ids, dtype) + linear_t(inner, w.b)
        case Quantized():
            rows = w.q[ids].astype(dtype)
            return rows * _row(w.scale, rows)
        case Tapped():
            lookup = lambda ids, w: embed(w, ids, dtype)  # noqa: E731
            return _tap(lookup, _embed_sides, ids, w.w, w.tap)
        case _:
            return w[ids].astype(dtype)


def value(w: Weight) -> Array:
    """The dense array that `w` stands for."""
    match w:
        case LowRank():
            return value(w.w) + _scaled_columns(w) @ w.b.mT
        case Quantized():
            return w.q.astype(w.scale.dtype) * w.scale
        case Tapped():
            return value(w.w)
        case _:
            return w


def _scaled(x: Array, scale: Array | None) -> Array:
    """``scale x`` in the dtype of `x`, multiplied in float32."""
    return x if scale is None else (scale * x.astype(jnp.float32)).astype(x.dtype)


def _scaled_columns(w: LowRank) -> Array:
    """``scale a``, of each of stacked weights."""
    return w.a if w.scale is None else _scaled(w.a, w.scale[..., None, None])


def _row(scale: Array, like: Array) -> Array:
    """Scales ``[1, out]`` with the rank and dtype of activations ``[*rows, out]``."""
    return scale.reshape((1,) * (like.ndim - 1) + (-1,)).astype(like.dtype)


# Taps: forward as if untapped; backward, the tap's cotangent is the statistics.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tap(product, sides, x, w, tap):
    """``product(x, w)``; `sides` makes the tap's cotangent from (x, dy)."""
    return product(x, w)


def _tap_forward(product, sides, x, w, tap):
    y, pullback = jax.vjp(product, x, w)
    return y, (x, pullback, tap)


def _tap_backward(product, sides, residuals, dy):
    x, pullback, tap = residuals
    return *pullback(dy), sides(x, dy, tap)


_tap.defvjp(_tap_forward, _tap_backward)


def _counted(dy: Array) -> Float[Array, " rows"]:
    """1 for the rows on which the loss depends."""
    return jnp.any(dy != 0, axis=-1).reshape(-1).astype(jnp.float32)


def _sum_rows(x: Array, counted: Float[Array, " rows"]) -> Array:
    """A product, which reads the rows in their own dtype and sums in float32."""
    rows = x.reshape(-1, x.shape[-1])
    return jnp.dot(
        counted.astype(x.dtype),
        rows,
        precision="highest",
        preferred_element_type=jnp.float32,
    )


def _linear_sides(x, dy, tap):
    counted = _counted(dy)
    return Tap(_sum_rows(x, counted), _sum_rows(dy, counted), jnp.sum(counted))


def _linear_t_sides(x, dy, tap):
    counted = _counted(dy)
    return Tap(_sum_rows(dy, counted), _sum_rows(x, counted), jnp.sum(counted))


def _embed_sides(ids, dy, tap):
    counted = _counted(dy)
    a = jnp.zeros_like(tap.a).at[ids.reshape(-1)].add(counted)
    return Tap(a, _sum_rows(dy, counted), jnp.sum(counted))


def _grouped(grouped_rows, w):
    x, sizes = grouped_rows
    return grouped_linear(x, w, sizes)


def _grouped_sides(grouped_rows, dy, tap):
    x, sizes = grouped_rows
    group = jnp.arange(sizes.shape[0], dtype=sizes.dtype)
    own = group[:, None] == group_of_rows(sizes, x.shape[0])[None]
    own = own.astype(jnp.float32) * _counted(dy)[None]
    sums = lambda x: own @ x.astype(jnp.float32)  # noqa: E731
    return Tap(a=sums(x), g=sums(dy), rows=jnp.sum(own, axis=1))
