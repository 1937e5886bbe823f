"""The network of fast weights and its step over one chunk (LaCT).

A small network per head, f(x) = W_down^T (silu(W_gate^T x) * (W_up^T x)), is trained
while the sequence is read. The loss of a token is -f(k) . v; a chunk of C tokens takes
one step on the sum over its tokens, all at the weights W the chunk began with. With
a = W_gate^T k, u = W_up^T k, h = silu(a) * u and g = W_down v, the step is

    D_down = sum_i eta_down,i  h_i v_i^T
    D_up   = sum_i eta_up,i    k_i (g_i * silu(a_i))^T
    D_gate = sum_i eta_gate,i  k_i (g_i * u_i * silu'(a_i))^T        (algorithm 1)
    M <- beta M + D,   beta the chunk's mean                          (momentum)
    U  = D or M, or its Newton-Schulz orthogonalisation               (Muon)
    W <- the initial norms on the rows of W + U                       (section 3.1)

Matrices are stored ``[in, out]``, so a row of the paper is a column here.

Reference: Zhang et al., "Test-Time Training Done Right", arXiv 2505.23884.

Dimension key: B batch, H heads, D head size, F hidden size, C tokens a chunk.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

OPTIMIZERS = ("gradient_descent", "muon")
NORM_PLACEMENTS = ("post", "pre", "none")

NEWTON_SCHULZ = {
    "paper": ((3.4445, -4.7750, 2.0315),) * 5,
    "schedule": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
"""Coefficients of each step, those of the paper and the schedule of the released code.
Singular values of at least 1% of the norm end in [0.68, 1.14] by the paper's and in
[0.97, 1.04] by the schedule."""


class FastWeights(NamedTuple):
    """The three matrices of every head; a batch axis leads where rows differ."""

    gate: Float[Array, "*B H D F"]
    up: Float[Array, "*B H D F"]
    down: Float[Array, "*B H F D"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """The rule by which a chunk changes the weights.

    Under Muon every step has size 1, whatever the rates are: they only weigh the tokens
    of a chunk, and with momentum the chunks, against each other.
    """

    optimizer: str = "muon"  # or "gradient_descent"
    # "post" rescales the weights after each step. "pre" sums the steps and rescales
    # the sum where it is used, so that a step counts less the more steps there were.
    # "none" rescales nothing.
    norm_placement: str = "post"
    newton_schulz: str = "schedule"  # Muon's coefficients; or "paper"

    def __post_init__(self):
        for name, choices in (
            ("optimizer", OPTIMIZERS),
            ("norm_placement", NORM_PLACEMENTS),
            ("newton_schulz", tuple(NEWTON_SCHULZ)),
        ):
            choice = getattr(self, name)
            if choice not in choices:
                raise ValueError(f"{name}={choice!r} is not one of {choices}.")


def apply(W: FastWeights, x: Float[Array, "*B H C D"]) -> Float[Array, "*B H C D"]:
    """Return ``f(x)``, float32."""
    hidden = jax.nn.silu(_matmul(x, W.gate)) * _matmul(x, W.up)
    return _matmul(hidden.astype(x.dtype), W.down)


def ascent(W: FastWeights, k, v, eta) -> FastWeights:
    """Return the sum over tokens of ``-eta * gradient``, with a rate for each matrix.

    Args:
        W: the weights at which the gradients are taken.
        k, v: ``[*B, H, C, D]``.
        eta: float32 ``[*B, H, C, 3]``, the rates of gate, up and down.
    """
    a, u, g = _matmul(k, W.gate), _matmul(k, W.up), _matmul(v, W.down.mT)
    s = jax.nn.sigmoid(a)

    def outer(left, right, rate):
        weighted = (left.astype(jnp.float32) * rate[..., None]).astype(k.dtype)
        return _matmul(weighted.mT, right.astype(k.dtype))

    return FastWeights(
        gate=outer(k, g * u * s * (1 + a * (1 - s)), eta[..., 0]),
        up=outer(k, g * a * s, eta[..., 1]),
        down=outer(a * s * u, v, eta[..., 2]),
    )


def newton_schulz(
    G: Float[Array, "*stack m n"], coefficients: str = "schedule", dtype: Any = None
) -> Float[Array, "*stack m n"]:
    """Orthogonalise each matrix of a stack, approximately: make singular values equal.

    X <- a X + (b X X^T + c (X X^T)^2) X, five times, starting from G / |G|.

    Args:
        G: float32; zero stays zero.
        coefficients: a name in `NEWTON_SCHULZ`.
        dtype: of the factors of each product, whose sum is float32; None: float32.
    """

    def cast(X):
        return X.astype(dtype or jnp.float32)

    wide = G.shape[-2] <= G.shape[-1]
    X = G if wide else G.mT
    X = X * jax.lax.rsqrt(jnp.sum(X * X, axis=(-2, -1), keepdims=True) + 1e-14)
    for a, b, c in NEWTON_SCHULZ[coefficients]:
        A = _matmul(cast(X), cast(X).mT)
        X = a * X + _matmul(cast(b * A + c * _matmul(cast(A), cast(A))), cast(X))
    return X if wide else X.mT


def rescale(W: FastWeights, initial: FastWeights) -> FastWeights:
    """Return `W` with each unit's norm over its inputs as it was initially."""

    def one(w, w_initial):
        def squares(x):
            return jnp.sum(x * x, axis=-2, keepdims=True) + 1e-14

        return w * jax.lax.rsqrt(squares(w)) * _like(jnp.sqrt(squares(w_initial)), w)

    return FastWeights(*map(one, W, initial))


def used(W: FastWeights, initial: FastWeights, rule: Rule) -> FastWeights:
    """Return the weights that queries read and gradients are taken at.

    They are `W`, rescaled under the norm placement "pre", where `W` is a plain sum.
    """
    return rescale(W, initial) if rule.norm_placement == "pre" else W


def update(
    W: FastWeights,
    velocity: FastWeights | None,
    k: Float[Array, "B H C D"],
    v: Float[Array, "B H C D"],
    eta: Float[Array, "B H C 3"],
    momentum: Float[Array, "B H"] | None,
    initial: FastWeights,
    rule: Rule,
) -> tuple[FastWeights, FastWeights | None]:
    """Take the step of one chunk.

    Args:
        W, velocity: float32, with a batch axis; without momentum the velocity is None.
        k, v: keys and values of the chunk.
        eta: float32 rates of gate, up and down; zero leaves a token out.
        momentum: float32, the chunk's beta.
        initial: the learned weights, without a batch axis.
        rule: the optimizer and the norm.

    Returns:
        The new weights and velocity.
    """
    step = ascent(used(W, initial, rule), k, v, eta)
    if velocity is not None:
        beta = jnp.asarray(momentum)[..., None, None]
        step = velocity = jax.tree.map(lambda m, d: beta * m + d, velocity, step)
    if rule.optimizer == "muon":
        orthogonal = (newton_schulz(d, rule.newton_schulz, k.dtype) for d in step)
        step = FastWeights(*orthogonal)
    W = FastWeights(*map(jnp.add, W, step))
    return (rescale(W, initial) if rule.norm_placement == "post" else W), velocity


def _matmul(x, y):
    """Multiply factors in the dtype of `x`; sum in float32."""
    return jnp.matmul(
        x, _like(y, x).astype(x.dtype), preferred_element_type=jnp.float32
    )


def _like(x, y):
    """Give `x` leading axes of size 1 until it has the rank of `y`."""
    return x.reshape((1,) * (y.ndim - x.ndim) + x.shape)
