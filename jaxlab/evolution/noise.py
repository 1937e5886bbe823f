"""The noise of a population's members, a function of (key, generation, direction).

A matrix W [in, out] moves along E = A B^T / sqrt(r) with A [in, r] and B [out, r] of
independent standard normals, so that every entry of E has variance 1 for any rank r;
every other parameter moves along a full normal. No noise is stored or sent: a device
that knows a member's number can draw its noise.

Reference: Sarkar et al., Evolution Strategies at the Hyperscale, arXiv 2511.16652.
"""

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.params import LowRank, ParamSpec, path_name, value

LOW_RANK_ROLES = ("matrix", "embedding", "head")
"""Roles of the matrices that multiply activations, where a low rank is cheap."""


class Factors(NamedTuple):
    """E = a b^T / sqrt(rank)."""

    a: Float[Array, "*stack in rank"]
    b: Float[Array, "*stack out rank"]


Noise = Factors | Array | None
"""The noise of one parameter; None where it is frozen."""


def direction(
    specs: Any,
    moved: Any,
    rank: int | None,
    key: Array,
    generation: Int[Array, ""],
    number: Int[Array, ""],
) -> Any:
    """Draw one direction of a generation, a tree of `Noise` shaped like `specs`.

    Args:
        specs: tree of `ParamSpec`.
        moved: tree of booleans, False for a frozen parameter.
        rank: None for full normals everywhere.
    """

    def one(path, spec: ParamSpec, moves: bool) -> Noise:
        if not moves:
            return None
        leaf_key = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
        draw_key = jax.random.fold_in(jax.random.fold_in(leaf_key, generation), number)
        if rank is None or spec.role not in LOW_RANK_ROLES:
            return _normal(draw_key, spec.shape)
        *stack, n_in, n_out = spec.shape
        both = _normal(draw_key, (*stack, n_in + n_out, rank))
        return Factors(both[..., :n_in, :], both[..., n_in:, :])

    return jax.tree_util.tree_map_with_path(one, specs, moved)


def _normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Draw normals of 16 random bits each, sqrt(2) erf^-1((2 u + 1) / 2^16 - 1).

    One random word makes two, because drawing is most of what a population costs; none
    is beyond 4.4. They are drawn as one row: a short last axis is slow on a CPU.
    """
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 2),))
    u = jnp.concatenate([words & 0xFFFF, words >> 16])[:size].astype(jnp.int32)
    between = (u.astype(jnp.float32) + 0.5) / 2**15 - 1
    return (math.sqrt(2) * jax.lax.erf_inv(between)).reshape(shape)


def divided(axes: tuple[str, ...], size: int, what: str) -> tuple[tuple[str, ...], int]:
    """Return the axes of the mesh in use that divide a population, and their devices.

    Args:
        axes: the axes that may divide it.
        size: the number to divide.
        what: what the number counts, for the error.

    Raises:
        ValueError: the number of devices does not divide `size`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = tuple(name for name in axes if mesh.shape.get(name, 1) > 1)
    parts = math.prod(mesh.shape[name] for name in names)
    if size % parts:
        raise ValueError(
            f"The mesh axes {names} have {parts} devices, which do not divide "
            f"{size} {what}."
        )
    return names, parts


def is_noise(x: Any) -> bool:
    """Whether a node of a tree of noise is the noise of one parameter."""
    return x is None or isinstance(x, Factors)


def moved_by(params: Any, noise: Any, scale: Float[Array, ""]) -> Any:
    """Return params + scale * noise; matrices are `LowRank` leaves that share a base.

    Args:
        params: tree with a leaf of any kind for each of `noise`.
        scale: sigma, negative for the second of an antithetic pair.
    """

    def one(e: Noise, w):
        match e:
            case None:
                return w
            case Factors():
                *stack, _, rank = e.a.shape
                factor = jnp.broadcast_to(scale / math.sqrt(rank), tuple(stack))
                return LowRank(w, e.a, e.b, factor)
            case _:
                base = value(w)
                return (base.astype(jnp.float32) + scale * e).astype(base.dtype)

    return jax.tree.map(one, noise, params, is_leaf=is_noise)


def axes(noise: Any) -> Any:
    """Return `in_axes` of `jax.vmap` for members made by `moved_by` and stacked."""

    def one(e: Noise):
        match e:
            case None:
                return None
            case Factors():
                return LowRank(None, 0, 0, 0)  # pyright: ignore[reportArgumentType]
            case _:
                return 0

    return jax.tree.map(one, noise, is_leaf=is_noise)


def weighted_sum(noise: Any, weights: Float[Array, " P"]) -> Any:
    """Return sum_p weights_p E_p, a dense float32 array for each parameter.

    Args:
        noise: the noise of P directions, stacked along a leading axis.
    """

    def one(e: Noise):
        match e:
            case None:
                return None
            case Factors():
                w = weights.reshape(-1, *(1,) * (e.a.ndim - 1))
                scale = 1 / math.sqrt(e.a.shape[-1])
                return jnp.einsum("p...ir,p...or->...io", scale * w * e.a, e.b)
            case _:
                return jnp.tensordot(weights, e, 1)

    return jax.tree.map(one, noise, is_leaf=is_noise)
