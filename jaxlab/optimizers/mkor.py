"""MKOR: Kronecker-factored second-order steps by rank-one updates of inverses.

The gradient G [in, out] of a weight in y = x W is multiplied by a factor on each side,

    U = A G B,    U <- U ||G|| / ||U||,

where A [in, in] comes from the layer's inputs and B [out, out] from the gradients at
its outputs. Each is updated with one vector v a step: the mean of the inputs for A, and
for B the sum of the gradients at the outputs, which is the gradient of a bias. So an
update costs O(d^2), devices exchange only vectors, and no matrix is inverted. With F
for either factor:

- "released", the authors' code: P = decay F + (1 - decay) I, then
  F <- P - P v v^T P / (1 + v^T P v), which is the inverse of P^-1 + v v^T. All
  eigenvalues stay in (0, 1].
- "exact": F <- [F - (1 - decay) F v v^T F / (decay + (1 - decay) v^T F v)] / decay, the
  inverse of the moving average decay C + (1 - decay) v v^T. It grows as decay^-t in
  directions to which no v contributes, so a factor whose norm exceeds `threshold` is
  blended with the identity: F <- blend F + (1 - blend) I.

Algorithm 1 as printed in the paper adds where the Sherman-Morrison formula subtracts.
Its F is the inverse of neither matrix and grows without bound along v, so it is not
offered here.

A factor is stored as its deviation from the identity, D = I - F: blending with the
identity then only scales D, and D = 0 leaves G unchanged to the bit. In terms of D the
released update is

    u = v - decay D v,    D <- (1 - eps) [decay D + u u^T / (1 + v^T u)]

where eps is the resolution of the stored dtype, so that rounding makes no eigenvalue of
F negative. In bfloat16 it is 2^-7, and a decay of 0.95 is 0.943 in effect. The exact
variant has no such guard: rounding can make its smallest eigenvalue negative.

Differs from the released code in: vectors are not clipped at 100, because bfloat16 can
represent them; a weight and its bias are rescaled to their joint norm; the vectors of
the first step are used; and a factor whose vector is not finite keeps its value, which
is counted in `MKORState.skipped`.

Reference: Mozaffari et al., MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer
Using Rank-1 Updates, arXiv 2306.01685.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxlab.optimizers.adamw import AdamW
from jaxlab.optimizers.factors import product, whole
from jaxlab.optimizers.lamb import LAMB, lamb
from jaxlab.optimizers.settings import PERIOD, SHARE, SIDE, Built, Range, check
from jaxlab.optimizers.sgd import SGD
from jaxlab.optimizers.switching import Switch, while_it_pays
from jaxlab.optimizers.trees import (
    PLACEHOLDER,
    beside,
    check_numbers,
    checked,
    with_specs,
)
from jaxlab.params import ROLES, Tap, infer, named_leaves, path_name, select
from jaxlab.params.spec import check_pattern

VARIANTS = ("released", "exact")
RANGES = {
    "decay": Range(
        "between 0 and 1",
        "it is the share of the past that a factor keeps, such as 0.95",
        above=0.0,
        below=1.0,
    ),
    "period": PERIOD,
    "largest": SIDE,
    "threshold": Range(
        "finite and above 1", "1 is the norm of the identity", above=1.0
    ),
    "blend": SHARE,
    "base": Built("the settings of an optimizer", "LAMB() is one"),
}


class Deviations(NamedTuple):
    """Deviations of a weight's two factors from the identity, D = I - F."""

    a: Float[Array, "*stack in in"]
    b: Float[Array, "*stack out out"]


class MKORState(NamedTuple):
    """State of `scale_by_mkor`.

    Attributes:
        count: steps made.
        deviations: those of the factors from the identity, by the path of the weight.
        skipped: updates of factors left out because a vector was not finite.
    """

    count: Int[Array, ""]
    deviations: dict[str, Deviations]
    skipped: Int[Array, ""]

    FIGURES = ("skipped",)


def preconditioned(specs: Any, excluded: Sequence[str] = ()) -> Any:
    """Tree of booleans: the weights that MKOR preconditions, all of role "matrix".

    Args:
        specs: tree of `ParamSpec`, or of parameters, whose roles are derived
            (`jaxlab.params.infer`).
        excluded: patterns of the paths of matrices that are not preconditioned.
    """
    specs = infer(specs)
    rules: list[tuple[str, bool]] = [(pattern, False) for pattern in excluded]
    rest = [(role, role == "matrix") for role in ROLES]
    return select(specs, [*rules, *rest])


def scale_by_mkor(
    specs: Any = None,
    *,
    variant: str = "released",
    decay: float = 0.95,
    period: int = 1,
    dtype: Any = jnp.bfloat16,
    largest: int = 8192,
    excluded: Sequence[str] = (),
    biases: Sequence[tuple[str, str]] = (),
    threshold: float = 10.0,
    blend: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """Multiply each weight's gradient by its two factors and keep the gradient's norm.

    `update` takes ``stats``, the taps that `jaxlab.params.untap` splits from a gradient
    with respect to ``tap(params, preconditioned(specs))``. The loss must be the one
    whose gradient is being updated. Gradients of other weights pass unchanged.

    Args:
        specs: tree of `ParamSpec`; None derives the roles from the arrays, as
            `jaxlab.params.infer` does.
        variant: "released" or "exact".
        decay: share of the past that a factor keeps at each update.
        period: steps between updates of the factors.
        dtype: dtype of the stored factors; arithmetic is in float32.
        largest: longest side that a factor may have.
        excluded: patterns of the paths of matrices that are not preconditioned.
        biases: pairs of a pattern of weights' paths and a replacement, as `re.sub`
            takes them, that name a weight's bias, such as ``(r"(.*)/w", r"\\1/b")``.
            The bias is one more row of G, whose input is 1.
        threshold: norm (largest absolute row sum) above which an exact factor is
            blended with the identity.
        blend: weight of the factor in that blend.

    Raises:
        ValueError: a setting is outside its range, a factor would be too large, or a
            bias is missing or does not fit; or, from `init` and `update`, trees differ
            in a leaf, or statistics are missing or do not fit.
    """
    check(
        RANGES,
        decay=decay,
        period=period,
        largest=largest,
        threshold=threshold,
        blend=blend,
    )
    _check_variant(variant, decay, dtype)
    _check_patterns(excluded, biases)

    def make(specs):
        return _scale_by_mkor(
            specs,
            variant,
            decay,
            period,
            dtype,
            largest,
            excluded,
            biases,
            threshold,
            blend,
        )

    return with_specs(specs, make)


def _scale_by_mkor(
    specs, variant, decay, period, dtype, largest, excluded, biases, threshold, blend
):
    weights = _weights(specs, excluded, biases, largest)
    structure = jax.tree.structure(specs)
    names = [name for name, _ in named_leaves(specs)]

    def init(params: Any) -> MKORState:
        del params  # the specs have the shapes

        def zeros(stack, n):
            return jnp.zeros((*stack, n, n), dtype)

        deviations = {
            name: Deviations(zeros(w.stack, w.n_in), zeros(w.stack, w.n_out))
            for name, w in weights.items()
        }

        def zero():  # one buffer for each counter: a step may donate them
            return jnp.zeros((), jnp.int32)

        return MKORState(zero(), beside(specs, deviations), zero())

    def update(updates, state: Any, params=None, *, stats=None, **_):
        del params
        leaves = dict(zip(names, structure.flatten_up_to(updates), strict=True))
        vectors = jax.tree.map(whole, _vectors(weights, names, stats))

        def renew(deviations):
            new, skipped = {}, jnp.zeros((), jnp.int32)
            for name in weights:
                a, skipped_a = renew_factor(deviations[name].a, vectors[name].a)
                b, skipped_b = renew_factor(deviations[name].b, vectors[name].b)
                new[name] = Deviations(a, b)
                skipped = skipped + skipped_a + skipped_b
            return new, skipped

        def renew_factor(D, v):
            new, finite = _renewed(
                D.astype(jnp.float32), v, variant, decay, threshold, blend
            )
            if variant == "released":
                new = new * (1 - float(jnp.finfo(dtype).eps))
            new = jnp.where(finite[..., None, None], new.astype(dtype), D)
            return new, jnp.sum(~finite, dtype=jnp.int32)

        if period == 1:
            deviations, skipped = renew(state.deviations)
        else:
            deviations, skipped = jax.lax.cond(
                state.count % period == 0,
                renew,
                lambda deviations: (deviations, jnp.zeros((), jnp.int32)),
                state.deviations,
            )
        deviations = jax.tree.map(whole, deviations)
        for name, w in weights.items():
            g = leaves[name].astype(jnp.float32)
            if w.bias:
                row = leaves[w.bias].astype(jnp.float32)[..., None, :]
                g = jnp.concatenate([g, row], axis=-2)
            u = _preconditioned(g, deviations[name])
            if w.bias:
                u, row = u[..., :-1, :], u[..., -1, :]
                leaves[w.bias] = row.astype(leaves[w.bias].dtype)
            leaves[name] = u.astype(leaves[name].dtype)
        state = MKORState(state.count + 1, deviations, state.skipped + skipped)
        return structure.unflatten(leaves.values()), state

    return optax.GradientTransformationExtraArgs(init, update)


def mkor(
    learning_rate: float | optax.Schedule,
    *,
    base: Callable[[Any], optax.GradientTransformation] | None = None,
    variant: str = "released",
    decay: float = 0.95,
    period: int = 1,
    dtype: Any = jnp.bfloat16,
    largest: int = 8192,
    excluded: Sequence[str] = (),
    biases: Sequence[tuple[str, str]] = (),
    threshold: float = 10.0,
    blend: float = 0.9,
    specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """MKOR on any pytree, followed by an optimizer with the momentum and learning rate.

    It needs statistics of the products with the weights. Models provide them if they
    multiply with `jaxlab.params.linear`, `linear_t` and `embed`::

        tapped = tap(params, preconditioned(params))
        gradient, stats = untap(jax.grad(loss)(tapped))
        updates, state = optimizer.update(gradient, state, params, stats=stats)

    Args:
        learning_rate: a number or a schedule, passed to `base`.
        base: function from the learning rate to the optimizer that takes the
            preconditioned gradients, such as `optax.adam`; None for `lamb` with its
            defaults and these `specs`.
        variant: "released" or "exact".
        decay: share of the past that a factor keeps at each update.
        period: steps between updates of the factors.
        dtype: dtype of the stored factors; arithmetic is in float32.
        largest: longest side that a factor may have.
        excluded: patterns of the paths of matrices that are not preconditioned.
        biases: pairs (pattern of weights' paths, replacement), see `scale_by_mkor`.
        threshold: norm above which an exact factor is blended with the identity.
        blend: weight of the factor in that blend.
        specs: tree of `ParamSpec`; None derives the roles from the arrays, as
            `jaxlab.params.infer` does.

    Returns:
        A transformation whose `update` also takes the parameters and ``stats``.

    Raises:
        ValueError: a setting is outside its range; or, from `init` and `update`, trees
            differ in a leaf, which the message names, or statistics are missing.

    Reference: Mozaffari et al., arXiv 2306.01685.
    """
    factors = scale_by_mkor(
        specs,
        variant=variant,
        decay=decay,
        period=period,
        dtype=dtype,
        largest=largest,
        excluded=excluded,
        biases=biases,
        threshold=threshold,
        blend=blend,
    )
    if base is None:
        base = functools.partial(lamb, specs=specs)
    if not callable(base):
        raise TypeError(
            f"base={base!r} must be a function from the learning rate to an "
            "optimizer, such as optax.adam."
        )
    return checked(optax.chain(factors, base(learning_rate)))


@dataclasses.dataclass(frozen=True)
class MKOR:
    """Settings of MKOR and of the optimizer that takes its preconditioned gradients."""

    base: LAMB | AdamW | SGD = LAMB()  # has the learning rate and the momentum
    variant: str = "released"  # or "exact"
    decay: float = 0.95  # share of the past that a factor keeps at each update
    period: int = 1  # steps between updates of the factors
    dtype: str = "bfloat16"  # dtype of the stored factors
    largest: int = 8192  # longest side that a factor may have
    excluded: tuple[str, ...] = ()  # patterns of matrices that are not preconditioned
    biases: tuple[tuple[str, str], ...] = ()  # (pattern of weights, name of the bias)
    threshold: float = 10.0  # norm above which an exact factor is blended
    blend: float = 0.9  # weight of the factor in the blend with the identity
    switch: Switch | None = None  # MKOR-H: when to stop preconditioning

    def __post_init__(self):
        check(RANGES, **vars(self))
        _check_variant(self.variant, self.decay, self.dtype)
        _check_patterns(self.excluded, self.biases)

    def tapped(self, specs: Any) -> Any:
        """Tree of booleans: the weights whose taps the transformation needs."""
        return preconditioned(specs, self.excluded)

    def build(self, specs: Any, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation for parameters `specs` and a run of `steps`."""
        factors = scale_by_mkor(
            specs,
            variant=self.variant,
            decay=self.decay,
            period=self.period,
            dtype=self.dtype,
            largest=self.largest,
            excluded=self.excluded,
            biases=self.biases,
            threshold=self.threshold,
            blend=self.blend,
        )
        if self.switch is not None:
            factors = while_it_pays(factors, self.switch)
        return checked(optax.chain(factors, self.base.build(specs, steps)))


def _renewed(D, v, variant, decay, threshold, blend):
    """The next D ``[*stack, n, n]``, and whether v gave a finite one ``[*stack]``."""
    keep = decay if variant == "released" else 1.0
    u = v - keep * product(D, v[..., None])[..., 0]  # P v, or F v
    vu = jnp.sum(v * u, axis=-1)
    finite = jnp.isfinite(vu)
    outer = u[..., :, None] * u[..., None, :]
    if variant == "released":
        return decay * D + outer / (1 + vu)[..., None, None], finite
    eye = jnp.eye(D.shape[-1], dtype=D.dtype)[(None,) * (D.ndim - 2)]
    outer *= ((1 - decay) / (decay + (1 - decay) * vu))[..., None, None]
    new = (D - (1 - decay) * eye + outer) / decay
    norm = jnp.max(jnp.sum(jnp.abs(eye - new), axis=-1), axis=-1)
    weight = jnp.where(norm > threshold, blend, 1.0)
    return weight[..., None, None] * new, finite


def _preconditioned(g, deviations: Deviations):
    """A G B with the norm of G."""
    a, b = (D.astype(jnp.float32) for D in deviations)
    left = g - product(a, g)
    u = left - product(left, b)
    ratio = _norm(g) / _norm(u)
    return jnp.where(jnp.isfinite(ratio), ratio, 1.0) * u


def _norm(x):
    return jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)


@dataclasses.dataclass(frozen=True)
class _Weight:
    """Sizes of a preconditioned weight's factors, and the path of its bias."""

    stack: tuple[int, ...]
    n_in: int  # one more where the bias is a row of G
    n_out: int
    bias: str | None


def _weights(specs, excluded, biases, largest) -> dict[str, _Weight]:
    chosen = jax.tree.leaves(preconditioned(specs, excluded))
    named = named_leaves(specs)
    shapes = {name: spec.shape for name, spec in named}
    weights = {}
    for (name, spec), is_chosen in zip(named, chosen, strict=True):
        if not is_chosen:
            continue
        *stack, n_in, n_out = spec.shape
        bias = _bias_of(name, biases)
        if bias is not None and shapes.get(bias) != (*stack, n_out):
            raise ValueError(
                f"biases names {bias} as the bias of {name} {spec.shape}, but its "
                f"shape is {shapes.get(bias)} (None: there is no such parameter) and "
                f"must be {(*stack, n_out)}."
            )
        if max(n_in + (bias is not None), n_out) > largest:
            raise ValueError(
                f"{name} {spec.shape} would have a factor above largest={largest}, "
                "and its memory and time grow with the square of the side; name the "
                "weight in `excluded`, or raise `largest`."
            )
        weights[name] = _Weight(tuple(stack), n_in + (bias is not None), n_out, bias)
    if not weights and not isinstance(specs, PLACEHOLDER):
        raise ValueError(
            f"No parameter is preconditioned: none of the {len(named)} that are "
            f"trained has the role 'matrix' and is not in excluded={tuple(excluded)}."
        )
    return weights


def _bias_of(name: str, biases) -> str | None:
    for pattern, replacement in biases:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return None


class _Vectors(NamedTuple):
    """The vectors that renew a weight's two factors."""

    a: Float[Array, "*stack in"]
    b: Float[Array, "*stack out"]


def _vectors(
    weights: dict[str, _Weight], names: Sequence[str], stats: Any
) -> dict[str, _Vectors]:
    """The vectors of a step, by the path of the weight."""
    if stats is None:
        raise ValueError(
            "MKOR needs statistics: differentiate with respect to tap(params, "
            "preconditioned(params)), split the gradient with untap, and call "
            "update(gradient, state, params, stats=taps)."
        )
    check_numbers(stats, "stats")
    pairs = jax.tree_util.tree_flatten_with_path(stats, is_leaf=_is_tap)[0]
    taps = {path_name(path): tap for path, tap in pairs if _is_tap(tap)}
    extra = [name for name in names if name in taps and name not in weights]
    if extra:
        raise ValueError(
            f"stats have a tap for {', '.join(extra[:4])}, which is not "
            "preconditioned; make them with tap(params, preconditioned(specs, "
            "excluded))."
        )
    vectors = {}
    for name, w in weights.items():
        tap = taps.get(name)
        if not isinstance(tap, Tap):
            raise ValueError(
                f"stats have no tap for {name} (but {type(tap).__name__}), which is "
                "preconditioned; give a tree like the parameters with a Tap there, or "
                "name the weight in `excluded`."
            )
        n_in = w.n_in - (w.bias is not None)
        for part, shape in (
            ("a", (*w.stack, n_in)),
            ("g", (*w.stack, w.n_out)),
            ("rows", w.stack),
        ):
            given = getattr(getattr(tap, part), "shape", None)
            if given != shape:
                raise ValueError(
                    f"The tap of {name} has {part} of shape {given}, but it must be "
                    f"{shape}; give the taps that untap splits off, summed and not "
                    "reshaped."
                )
        rows = jnp.maximum(tap.rows, 1.0)[..., None]
        a = (tap.a / rows).astype(jnp.float32)
        if w.bias:
            a = jnp.concatenate([a, jnp.ones((*w.stack, 1), jnp.float32)], axis=-1)
        vectors[name] = _Vectors(a, tap.g.astype(jnp.float32))
    return vectors


def _is_tap(node: Any) -> bool:
    return isinstance(node, Tap)


def _check_patterns(excluded: Any, biases: Any) -> None:
    """Refuse what is no sequence of patterns, such as one, or no pattern."""
    if isinstance(excluded, str):
        raise TypeError(
            f"excluded={excluded!r} must be a sequence of patterns: ({excluded!r},)."
        )
    if isinstance(biases, str) or any(
        isinstance(pair, str) or len(pair) != 2 for pair in biases
    ):
        raise TypeError(
            f"biases={biases!r} must be a sequence of pairs (pattern of weights' "
            "paths, replacement)."
        )
    for pattern in (*excluded, *(pattern for pattern, _ in biases)):
        check_pattern(pattern)


def _is_float(dtype: Any) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


def _check_variant(variant: str, decay: float, dtype: Any) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is not one of {VARIANTS}.")
    if not _is_float(dtype):
        raise ValueError(
            f"dtype={dtype!r} must be a type of floating-point numbers, in which "
            "factors are stored, such as 'bfloat16'."
        )
    largest = 1 - float(jnp.finfo(dtype).eps)
    known = not isinstance(decay, Tracer)
    if variant == "released" and known and decay > largest:
        raise ValueError(
            f"decay={decay} is above {largest:.4g}, the largest for factors stored in "
            f"{jnp.dtype(dtype).name}; set dtype='float32', or a smaller decay."
        )
