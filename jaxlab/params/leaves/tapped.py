"""A weight whose products report their statistics as a gradient."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxlab.params.grouped import group_of_rows
from jaxlab.params.products import (
    Leaf,
    Weight,
    embed,
    grouped_linear,
    linear,
    linear_t,
    value,
)


@struct.dataclass
class Tap:
    """Sums over the rows of one or more products ``y = x w``.

    Rows on which the loss does not depend, such as padding, are left out; the gradient
    of their output is all zeros.

    Attributes:
        a: float32 ``[in]``, sum of the vectors on the weight's input side.
        g: float32 ``[out]``, sum of the vectors on its output side.
        rows: float32 scalar, the number of rows summed.

    For `linear` and `embed`, `a` sums inputs (one-hot for `embed`) and `g` sums
    gradients of outputs; for `linear_t` it is the other way round.
    """

    a: Float[Array, "*stack in"]
    g: Float[Array, "*stack out"]
    rows: Float[Array, "*stack"]


@struct.dataclass
class Tapped(Leaf):
    """The weight `w` whose products report their statistics as the gradient of `tap`.

    One `jax.grad` gives the gradients and the statistics; the sums add up over reuse of
    the weight, scan steps and accumulated batches.

    Attributes:
        w: the weight ``[in, out]``, any leaf.
        tap: a `Tap` of zeros from `tapped`.
    """

    w: Weight
    tap: Tap

    def linear(self, x):
        """``x w``, tapped."""
        return _tap(linear, _linear_sides, x, self.w, self.tap)

    def linear_t(self, x):
        """``x w^T``, tapped."""
        return _tap(linear_t, _linear_t_sides, x, self.w, self.tap)

    def grouped_linear(self, x, sizes):
        """`linear` for rows in groups, with one tap per group."""
        return _tap(_grouped, _grouped_sides, (x, sizes), self.w, self.tap)

    def embed(self, ids, dtype: Any = jnp.float32):
        """Rows `ids` of `w`, tapped."""

        def lookup(ids, w):
            return embed(w, ids, dtype)

        return _tap(lookup, _embed_sides, ids, self.w, self.tap)

    def value(self) -> Array:
        """The dense `w`, which is not tapped."""
        return value(self.w)


def tapped(w: Weight) -> Tapped:
    """`w` with a fresh tap."""
    *stack, n_in, n_out = jax.eval_shape(value, w).shape

    def zeros(*shape):
        return jnp.zeros((*stack, *shape), jnp.float32)

    return Tapped(w, Tap(a=zeros(n_in), g=zeros(n_out), rows=zeros()))


def tap(tree: Any, where: Any) -> Any:
    """`tree` with fresh taps on some of its weights.

    Args:
        tree: parameters.
        where: tree of booleans, one per weight, as from `select`.
    """
    return jax.tree.map(lambda tap, w: tapped(w) if tap else w, where, tree)


def untap(tree: Any) -> tuple[Any, Any]:
    """Split weights or gradients into the tree without taps and the taps, else None."""

    def is_tapped(w):
        return isinstance(w, Tapped)

    def split(part):
        return jax.tree.map(part, tree, is_leaf=is_tapped)

    return (
        split(lambda w: w.w if is_tapped(w) else w),
        split(lambda w: w.tap if is_tapped(w) else None),
    )


def divided_taps(taps: Any, by: Array) -> Any:
    """The taps of a loss divided by `by`: this divides gradients `g`, not inputs `a`.

    This holds for weights used by `linear` and `embed`; `linear_t` exchanges the two.
    """
    return jax.tree.map(
        lambda tap: Tap(tap.a, tap.g / by, tap.rows),
        taps,
        is_leaf=lambda x: isinstance(x, Tap),
    )


def sketch_taps(gradient: Any, where: Any, key: Array) -> Any:
    """Taps for a gradient that no products report, such as an evolution strategy's.

    For a weight's gradient G ``[in, out]`` and vectors s and t of random signs,

        a = G s / rms(G s),    g = G^T t / sqrt(in).

    The mean of (G s)(G s)^T over the signs is G G^T, and that of g g^T is G^T G / in:
    the statistics of Shampoo, in the place of those of inputs and of gradients at
    outputs. `a` is scaled to the root mean square 1 of inputs that leave a norm.

    Args:
        gradient: tree of arrays.
        where: tree of booleans, one a weight; the others get None.
        key: draws the signs.
    """
    leaves, structure = jax.tree.flatten(gradient)
    keys = structure.unflatten(list(jax.random.split(key, len(leaves))))

    def sketch(taps: bool, G: Array, key: Array) -> Tap | None:
        if not taps:
            return None
        of_a, of_g = jax.random.split(key)
        *stack, n_in, n_out = G.shape
        G = G.astype(jnp.float32)
        s = jax.random.rademacher(of_a, (*stack, n_out), jnp.float32)
        t = jax.random.rademacher(of_g, (*stack, n_in), jnp.float32)
        a = jnp.einsum("...io,...o->...i", G, s, precision="highest")
        g = jnp.einsum("...io,...i->...o", G, t, precision="highest") / math.sqrt(n_in)
        size = jnp.sqrt(jnp.mean(jnp.square(a), axis=-1, keepdims=True))
        a = jnp.where(size > 0, a / size, 0.0)
        return Tap(a, g, jnp.ones(stack, jnp.float32))

    return jax.tree.map(sketch, where, gradient, keys)


# Forward, a tap changes nothing; backward, its cotangent is the statistics.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tap(product, sides, x, w, tap):
    """``product(x, w)``; the tap's cotangent is ``sides(x, dy, tap)``."""
    return product(x, w)


def _tap_forward(product, sides, x, w, tap):
    y, pullback = jax.vjp(product, x, w)
    return y, (x, pullback, tap)


def _tap_backward(product, sides, residuals, dy):
    x, pullback, tap = residuals
    return *pullback(dy), sides(x, dy, tap)


_tap.defvjp(_tap_forward, _tap_backward)


def _counted(dy: Array) -> Float[Array, " rows"]:
    """1 for the rows on which the loss depends, 0 for the others."""
    return jnp.any(dy != 0, axis=-1).reshape(-1).astype(jnp.float32)


def _sum_rows(x: Array, counted: Float[Array, " rows"]) -> Array:
    """Sum the counted rows: a product that reads them in their dtype, in float32."""
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
    in_group = group[:, None] == group_of_rows(sizes, x.shape[0])[None]
    in_group = in_group.astype(jnp.float32) * _counted(dy)[None]

    def sums(x):
        return in_group @ x.astype(jnp.float32)

    return Tap(a=sums(x), g=sums(dy), rows=jnp.sum(in_group, axis=1))
