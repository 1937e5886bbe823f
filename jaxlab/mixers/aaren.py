"""Aaren: attention as a recurrent network, with a learned query that is constant.

    s_t = q . k_t / sqrt(D)
    o_t = sum_{i <= t} softmax_i(s_i) v_i

Because the query does not depend on the token, all outputs are prefix sums. The sum of
a set of tokens is m = max s_i, u = sum e^{s_i - m}, w = sum e^{s_i - m} v_i. Two sums
add up to

    (m_A, u_A, w_A) + (m_B, u_B, w_B) = (m, u_A e^{m_A - m} + u_B e^{m_B - m},
                                            w_A e^{m_A - m} + w_B e^{m_B - m})

with m = max(m_A, m_B), which is associative, and o = w / u. So a whole sequence is one
parallel scan, and each further token costs the same at any position.

Reference: Feng et al., Attention as an RNN, arXiv 2405.13956, section 3 and figure 4.

Differs from the paper in: each head learns its query directly, where the paper has one
query for a layer and projects it with a matrix. Both can express the same functions.

Dimension key: B batch, T time, H heads, D head size.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from jaxlab.layers import contract, segments
from jaxlab.mixers.sizes import check_heads, check_sizes
from jaxlab.params import ParamSpec, constrain, linear, value

# The largest score of an empty set: finite, because inf - inf is NaN.
NOTHING = float(jnp.finfo(jnp.float32).min) / 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of an Aaren layer."""

    width: int  # the model's width
    n_heads: int = 4
    head_size: int | None = None  # None: width / n_heads

    def __post_init__(self):
        check_sizes(self, "width", "n_heads", "head_size")
        check_heads(self, "head_size")

    @property
    def D(self) -> int:
        return self.head_size or self.width // self.n_heads


def spec(cfg: Config) -> dict[str, ParamSpec]:
    """The parameters of the layer."""
    H, D = cfg.n_heads, cfg.D
    return {
        "query": ParamSpec((H, D), ("heads", None), initializers.normal(1.0), "bias"),
        "w_k": ParamSpec((cfg.width, H * D), ("width", "heads")),
        "w_v": ParamSpec((cfg.width, H * D), ("width", "heads")),
        "w_o": ParamSpec((H * D, cfg.width), ("heads", "width")),
    }


@struct.dataclass
class AarenState:
    """The sum of a set of tokens; all arrays are float32.

    Attributes:
        m: ``[..., H]``, the largest score.
        u: ``[..., H]``, the sum of the weights e^{s - m}.
        w: ``[..., H, D]``, the weighted sum of the values.
    """

    m: Float[Array, "*set H"]
    u: Float[Array, "*set H"]
    w: Float[Array, "*set H D"]


def init_state(
    cfg: Config, batch: int, max_length: int | None = None, dtype: Any = jnp.float32
) -> AarenState:
    """The sum of no tokens; `max_length` and `dtype` have no effect."""
    del max_length, dtype
    heads = (batch, cfg.n_heads)
    return AarenState(
        m=jnp.full(heads, NOTHING, jnp.float32),
        u=jnp.zeros(heads, jnp.float32),
        w=jnp.zeros((*heads, cfg.D), jnp.float32),
    )


def combine(a: AarenState, b: AarenState) -> AarenState:
    """Add the sums of two sets of tokens."""
    m = jnp.maximum(a.m, b.m)
    scale_a, scale_b = jnp.exp(a.m - m), jnp.exp(b.m - m)
    w = scale_a[..., None] * a.w + scale_b[..., None] * b.w
    return AarenState(m, scale_a * a.u + scale_b * b.u, w)


def _combine_in_order(a, b):
    """Combine consecutive pairs of a sum and whether its tokens open a document.

    A sum that opens a document discards everything before it.
    """
    (a, a_opens), (b, b_opens) = a, b
    opens = b_opens[..., None]
    before = AarenState(
        m=jnp.where(opens, NOTHING, a.m),
        u=jnp.where(opens, 0.0, a.u),
        w=jnp.where(opens[..., None], 0.0, a.w),
    )
    return combine(before, b), a_opens | b_opens


def _tokens(params, x, cfg: Config) -> AarenState:
    """The sum of each single token of x ``[..., width]``."""
    heads = (*x.shape[:-1], cfg.n_heads, cfg.D)
    k = linear(x, params["w_k"]).reshape(heads)
    v = linear(x, params["w_v"]).reshape(heads).astype(jnp.float32)
    q = value(params["query"]).astype(jnp.float32)
    s = cfg.D**-0.5 * jnp.einsum("...hd,hd->...h", k.astype(jnp.float32), q)
    # Outputs do not depend on m, so it needs no gradient: that of s is all through u.
    m = jax.lax.stop_gradient(s)
    u = jnp.exp(s - m)
    return AarenState(m, u, u[..., None] * v)


def _output(params, tokens: AarenState, x):
    """Project the weighted mean of the values; zero for no tokens."""
    o = tokens.w / jnp.where(tokens.u > 0, tokens.u, 1.0)[..., None]
    return linear(o.reshape(*x.shape[:-1], -1).astype(x.dtype), params["w_o"])


@contract.forward
def forward(
    params: Any,
    x: Float[Array, "B T width"],
    cfg: Config,
    *,
    state: AarenState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T width"], AarenState | None]:
    """Scan over all prefixes in parallel; see `jaxlab.mixers` for the contract."""
    B, T, _ = x.shape
    tokens = _tokens(params, x, cfg)
    opens_BT = jnp.zeros((B, T), bool)
    if segment_ids is not None:
        is_real = segments.real(segment_ids)
        present = is_real[..., None]
        tokens = AarenState(
            m=jnp.where(present, tokens.m, NOTHING),
            u=jnp.where(present, tokens.u, 0.0),
            w=jnp.where(present[..., None], tokens.w, 0.0),
        )
        ids = segments.documents(segment_ids)
        before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)))
        opens_BT = is_real & (ids != before) & (ids > 1)  # not the first document
    tokens = AarenState(
        m=constrain(tokens.m, "batch", "time", "heads"),
        u=constrain(tokens.u, "batch", "time", "heads"),
        w=constrain(tokens.w, "batch", "time", "heads", None),
    )
    prefixes, opened_BT = jax.lax.associative_scan(
        _combine_in_order, (tokens, opens_BT), axis=1
    )
    if state is not None:
        start = jax.tree.map(lambda a: a[:, None], state), jnp.zeros((B, 1), bool)
        prefixes, _ = _combine_in_order(start, (prefixes, opened_BT))
    y = _output(params, prefixes, x)
    if segment_ids is not None:  # padding has no output
        y = jnp.where(is_real[..., None], y, jnp.zeros((), y.dtype))
    if state is None:
        return y, None
    return y, jax.tree.map(lambda a: a[:, -1], prefixes)


@contract.step
def step(
    params: Any, x: Float[Array, "B width"], cfg: Config, state: AarenState
) -> tuple[Float[Array, "B width"], AarenState]:
    """Add one token, at a cost independent of the position."""
    state = combine(state, _tokens(params, x, cfg))
    return _output(params, state, x), state
