"""Programs with the operations, to compile ahead of time by name; see `aot`.

Each function returns a program and the `jax.ShapeDtypeStruct` of its arguments. Heads
and their channels form one axis, as after a model's projections, so that the change of
layout for a kernel is compiled with it.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.delta_rule import delta_product
from pallas_kernels.linear_attention import gated_linear_attention
from pallas_kernels.paged_attention import paged_attention as _paged_attention
from pallas_kernels.selective_scan import selective_scan as _selective_scan
from pallas_kernels.tpu import block_sizes

Program = tuple[Callable, tuple[jax.ShapeDtypeStruct, ...]]


def delta_rule(
    T: int,
    H: int = 16,
    K: int = 128,
    V: int = 128,
    N: int = 1,
    B: int = 1,
    dtype: str = "bfloat16",
    gated: bool = True,
    backward: bool = False,
    sequences: int = 0,
    implementation: str = "pallas_tpu",
) -> Program:
    """The delta rule with N steps per token; with `backward`, also its gradient.

    With `sequences`, a row holds that many sequences of equal length.
    """
    bounds = jnp.linspace(0, T, sequences + 1).astype(jnp.int32) if sequences else None

    def forward(q, k, v, beta, g):
        o, state = delta_product(
            q.reshape(B, T, H, K),
            k.reshape(B, T, N, H, K),
            v.reshape(B, T, N, H, V),
            beta,
            g if gated else None,
            cu_seqlens=bounds,
            implementation=implementation,
        )
        return o.reshape(B, T, H * V), state

    shapes = (
        jax.ShapeDtypeStruct((B, T, H * K), dtype),
        jax.ShapeDtypeStruct((B, T * N, H * K), dtype),
        jax.ShapeDtypeStruct((B, T * N, H * V), dtype),
        jax.ShapeDtypeStruct((B, T, N, H), jnp.float32),
        jax.ShapeDtypeStruct((B, T, H), jnp.float32),
    )
    return _both(forward) if backward else forward, shapes


def linear_attention(
    T: int,
    H: int = 16,
    K: int = 128,
    V: int = 128,
    B: int = 1,
    dtype: str = "bfloat16",
    decay: str | None = "head",
    backward: bool = False,
    sequences: int = 0,
    implementation: str = "pallas_tpu",
) -> Program:
    """Gated linear attention with a decay per "head" or per "channel"."""
    bounds = jnp.linspace(0, T, sequences + 1).astype(jnp.int32) if sequences else None

    def forward(q, k, v, g):
        o, state = gated_linear_attention(
            q.reshape(B, T, H, K),
            k.reshape(B, T, H, K),
            v.reshape(B, T, H, V),
            {"head": g, "channel": g.reshape(B, T, H, -1), None: None}[decay],
            cu_seqlens=bounds,
            implementation=implementation,
        )
        return o.reshape(B, T, H * V), state

    shapes = (
        jax.ShapeDtypeStruct((B, T, H * K), dtype),
        jax.ShapeDtypeStruct((B, T, H * K), dtype),
        jax.ShapeDtypeStruct((B, T, H * V), dtype),
        jax.ShapeDtypeStruct((B, T, H * K if decay == "channel" else H), jnp.float32),
    )
    return _both(forward) if backward else forward, shapes


def delta_rule_step(
    B: int,
    H: int = 16,
    K: int = 128,
    V: int = 128,
    N: int = 1,
    dtype: str = "bfloat16",
    implementation: str = "pallas_tpu",
) -> Program:
    """A decode step of the delta rule, in place."""

    @partial(jax.jit, donate_argnums=0)
    def step(state, q, k, v, beta, g):
        return delta_product(
            q,
            k,
            v,
            beta,
            g,
            initial_state=state,
            implementation=implementation,
        )

    shapes = (
        jax.ShapeDtypeStruct((B, H, K, V), jnp.float32),
        jax.ShapeDtypeStruct((B, 1, H, K), dtype),
        jax.ShapeDtypeStruct((B, 1, N, H, K), dtype),
        jax.ShapeDtypeStruct((B, 1, N, H, V), dtype),
        jax.ShapeDtypeStruct((B, 1, N, H), jnp.float32),
        jax.ShapeDtypeStruct((B, 1, H), jnp.float32),
    )
    return step, shapes


def linear_attention_step(
    B: int,
    H: int = 16,
    K: int = 128,
    V: int = 128,
    dtype: str = "bfloat16",
    decay: str | None = "head",
    implementation: str = "pallas_tpu",
) -> Program:
    """A decode step of gated linear attention, in place."""

    @partial(jax.jit, donate_argnums=0)
    def step(state, q, k, v, g):
        return gated_linear_attention(
            q,
            k,
            v,
            None if decay is None else g,
            initial_state=state,
            implementation=implementation,
        )

    shapes = (
        jax.ShapeDtypeStruct((B, H, K, V), jnp.float32),
        jax.ShapeDtypeStruct((B, 1, H, K), dtype),
        jax.ShapeDtypeStruct((B, 1, H, K), dtype),
        jax.ShapeDtypeStruct((B, 1, H, V), dtype),
        jax.ShapeDtypeStruct(
            (B, 1, H, K) if decay == "channel" else (B, 1, H), jnp.float32
        ),
    )
    return step, shapes


def selective_scan(
    T: int,
    E: int = 2048,
    N: int = 16,
    B: int = 1,
    dtype: str = "bfloat16",
    backward: bool = False,
    sequences: int = 0,
    segments: int = 0,
    implementation: str = "pallas_tpu",
) -> Program:
    """The selective scan.

    With `sequences`, a row holds that many sequences of equal length; with `segments`,
    that many documents.
    """
    bounds = jnp.linspace(0, T, sequences + 1).astype(jnp.int32) if sequences else None

    def forward(x, dt, A, in_B, in_C, D):
        ids = jnp.broadcast_to(jnp.arange(T) * segments // T, (B, T))
        return _selective_scan(
            x,
            dt,
            A,
            in_B,
            in_C,
            D,
            cu_seqlens=bounds,
            segment_ids=ids if segments else None,
            implementation=implementation,
        )

    shapes = (
        jax.ShapeDtypeStruct((B, T, E), dtype),
        jax.ShapeDtypeStruct((B, T, E), jnp.float32),
        jax.ShapeDtypeStruct((E, N), jnp.float32),
        jax.ShapeDtypeStruct((B, T, N), dtype),
        jax.ShapeDtypeStruct((B, T, N), dtype),
        jax.ShapeDtypeStruct((E,), jnp.float32),
    )
    return _both(forward) if backward else forward, shapes


def paged_attention(
    heads: Sequence[int],
    room: Sequence[int],
    dtype: str,
    pages: str | None = None,
    implementation: str = "pallas_tpu",
    **masks,
) -> Program:
    """Paged attention, for as many queries and pages as there is room for.

    Args:
        heads: query heads, heads of keys and values, head size, tokens a page.
        room: sequences, rows of queries, pages, pages a sequence.
        dtype: of queries, and of pages unless `pages` is given.
        pages: the dtype of quantised pages.
        **masks: the window and the soft cap.
    """
    Hq, Hkv, D, page = heads
    S, Tq, P, pages_per_seq = room
    cache = (P, page, Hkv, D)
    shapes = tuple(
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        for shape, dtype in (
            ((Tq, Hq, D), dtype),
            (cache, pages or dtype),
            (cache, pages or dtype),
            ((S, pages_per_seq), "int32"),
            ((S,), "int32"),
            ((S + 1,), "int32"),
            *[(cache[:3], "float32")] * (2 if pages else 0),
        )
    )

    def call(*arrays):
        *arrays, k_scale, v_scale = arrays if pages else (*arrays, None, None)
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        return _paged_attention(
            *arrays, **scales, **masks, implementation=implementation
        )

    return call, shapes


def with_block_sizes(program: str, sizes: dict[str, int], **arguments) -> Program:
    """A program of this module, with block sizes that replace the table's."""
    function, shapes = globals()[program](**arguments)

    def run(*inputs):
        with block_sizes.trying(sizes):
            return function(*inputs)

    return run, shapes


def _both(forward: Callable) -> Callable:
    """A function and its gradient, that of half the sum of its squared results."""

    def both(*inputs):
        results, pull_back = jax.vjp(forward, *inputs)
        return results, pull_back(results)

    return both
