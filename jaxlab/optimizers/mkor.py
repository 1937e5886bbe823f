"""MKOR: Kronecker-factored second-order steps by rank-one updates of inverses.

The gradient G [in, out] of a weight in y = x W is taken between two factors,

    U = A G B,    U <- U ||G|| / ||U||,

A [in, in] of the layer's inputs and B [out, out] of the gradients at its outputs. Each
is kept by one vector v a step, the mean of the inputs or the sum of the gradients at
the outputs, which is the gradient of a bias. So an update costs O(d^2), devices
exchange vectors, and nothing is inverted. With F for either factor:

- "released", the authors' code: P = decay F + (1 - decay) I, then
  F <- P - P v v^T P / (1 + v^T P v), which is the inverse of P^-1 + v v^T. All
  eigenvalues stay in (0, 1].
- "exact": F <- [F - (1 - decay) F v v^T F / (decay + (1 - decay) v^T F v)] / decay, the
  inverse of the moving average decay C + (1 - decay) v v^T. It grows where no v
  points, as decay^-t, so that a factor whose norm is above `threshold` is mixed with
  the identity: F <- blend F + (1 - blend) I.

The formula printed in the paper's Algorithm 1 adds where the Sherman-Morrison formula
subtracts: it is the inverse of neither, grows without bound where v points, and is not
here.

A factor is stored as D = I - F, what it lacks to the identity: mixing with the identity
is a product, and an empty D leaves G as it is to the bit. In D the released update is

    u = v - decay D v,    D <- (1 - eps) [decay D + u u^T / (1 + v^T u)]

with eps the resolution of the stored dtype, so that rounding makes no eigenvalue of F
negative: 2^-7 in bfloat16, where a decay of 0.95 is 0.943 in effect. The exact variant
has no such guard: rounding can make its smallest negative.

Differs from the released code in: vectors are not clipped at 100, because bfloat16
holds them; the norm of a weight and its bias is their joint one; the first step's
vectors count; and a factor whose vector is not finite keeps its value and is counted.

Reference: Mozaffari et al., MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer
Using Rank-1 Updates, arXiv 2306.01685.
"""

import dataclasses
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
from jaxlab.optimizers.settings import PERIOD, SHARE, SIDE, Range, check
from jaxlab.optimizers.sgd import SGD
from jaxlab.optimizers.switching import Switch, while_it_pays
from jaxlab.optimizers.trees import PLACEHOLDER, beside, with_specs
from jaxlab.params import ROLES, Tap, infer, named_leaves, path_name, select

VARIANTS = ("released", "exact")
RANGES = {
    "decay": Range(
        "between 0 and 1",
        "it is the share that a factor keeps of the past, such as 0.95",
        above=0.0,
        below=1.0,
    ),
    "period": PERIOD,
    "largest": SIDE,
    "threshold": Range(
        "finite and above 1", "1 is the norm of the identity", above=1.0
    ),
    "blend": SHARE,
}


class Lacks(NamedTuple):
    """Difference of the factors of one weight from the identity, D = I - F."""

    a: Float[Array, "*stack in in"]
    b: Float[Array, "*stack out out"]


class MKORState(NamedTuple):
    """State of `scale_by_mkor`.

    Attributes:
        count: steps made.
        lacks: for each preconditioned weight, by its path.
        skipped: updates of factors left out because of what was not finite.
    """

    count: Int[Array, ""]
    lacks: dict[str, Lacks]
    skipped: Int[Array, ""]

    FIGURES = ("skipped",)


def preconditioned(specs: Any, excluded: Sequence[str] = ()) -> Any:
    """Tree of booleans: the weights that MKOR takes, all of role "matrix".

    Args:
        specs: tree of `ParamSpec`, or of parameters, whose roles are derived
            (`jaxlab.params.infer`).
        excluded: patterns of the paths of matrices that it shall leave alone.
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
    """Gradients between the two factors of each weight, with their own norms.

    `update` takes ``stats``, the taps of `jaxlab.params.untap`: of gradients with
    respect to ``tap(params, preconditioned(specs))``, for the loss whose gradient it
    is given. Weights that are not preconditioned pass unchanged.

    Args:
        specs: tree of `ParamSpec`; None derives the roles from the arrays, as
            `jaxlab.params.infer` does.
        variant: "released" or "exact".
        decay: of a factor's memory.
        period: steps between updates of the factors.
        dtype: of stored factors; arithmetic is in float32.
        largest: side of a factor.
        excluded: patterns of the paths of matrices that are not preconditioned.
        biases: pairs (pattern of weights' paths, replacement), as of `re.sub`, that
            name a weight's bias, such as ``(r"(.*)/w", r"\\1/b")``: one more row of its
            G, whose input is 1.
        threshold: norm of an exact factor, its largest sum of a row's absolute values,
            that mixes it with the identity.
        blend: share that is left of it.

    Raises:
        ValueError: a setting outside its range, a factor that would be too large, a
            bias that is not there or does not fit; or, at `init` and `update`, trees
            that differ in a leaf, and statistics that are missing or do not fit.
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

        lacks = {
            name: Lacks(zeros(w.stack, w.n_in), zeros(w.stack, w.n_out))
            for name, w in weights.items()
        }

        def none():  # a buffer each: a step may donate them
            return jnp.zeros((), jnp.int32)

        return MKORState(none(), beside(specs, lacks), none())

    def update(updates, state: Any, params=None, *, stats=None, **_):
        del params
        _check_state(weights, state.lacks)
        leaves = dict(zip(names, structure.flatten_up_to(updates), strict=True))
        vectors = jax.tree.map(whole, _vectors(weights, names, stats))

        def renew(lacks):
            new, skipped = {}, jnp.zeros((), jnp.int32)
            for name in weights:
                a, left = one(lacks[name].a, vectors[name].a)
                b, right = one(lacks[name].b, vectors[name].b)
                new[name], skipped = Lacks(a, b), skipped + left + right
            return new, skipped

        def one(lack, v):
            new, ok = _renewed(
                lack.astype(jnp.float32), v, variant, decay, threshold, blend
            )
            if variant == "released":
                new = new * (1 - float(jnp.finfo(dtype).eps))
            keep = ok[..., None, None]
            return jnp.where(keep, new.astype(dtype), lack), jnp.sum(
                ~ok, dtype=jnp.int32
            )

        if period == 1:
            lacks, skipped = renew(state.lacks)
        else:
            lacks, skipped = jax.lax.cond(
                state.count % period == 0,
                renew,
                lambda lacks: (lacks, jnp.zeros((), jnp.int32)),
                state.lacks,
            )
        lacks = jax.tree.map(whole, lacks)
        for name, w in weights.items():
            g = leaves[name].astype(jnp.float32)
            if w.bias:
                row = leaves[w.bias].astype(jnp.float32)[..., None, :]
                g = jnp.concatenate([g, row], axis=-2)
            u = _between(g, lacks[name])
            if w.bias:
                u, row = u[..., :-1, :], u[..., -1, :]
                leaves[w.bias] = row.astype(leaves[w.bias].dtype)
            leaves[name] = u.astype(leaves[name].dtype)
        state = MKORState(state.count + 1, lacks, state.skipped + skipped)
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
    """MKOR on any pytree, in front of an optimizer with the momentum and the rate.

    It needs the statistics of the products of the weights, which models give that
    multiply by `jaxlab.params.linear`, `linear_t` and `embed`::

        tapped = tap(params, preconditioned(params))
        gradient, stats = untap(jax.grad(loss)(tapped))
        updates, state = optimizer.update(gradient, state, params, stats=stats)

    Args:
        learning_rate: of `base`, a number or a schedule.
        base: from the learning rate to the optimizer behind the factors, such as
            `optax.adam`; None for `lamb` with its defaults and these `specs`.
        variant: "released" or "exact".
        decay: of a factor's memory.
        period: steps between updates of the factors.
        dtype: of stored factors; arithmetic is in float32.
        largest: side of a factor.
        excluded: patterns of the paths of matrices that only the base moves.
        biases: pairs (pattern of weights' paths, replacement), see `scale_by_mkor`.
        threshold: norm of an exact factor that mixes it with the identity.
        blend: share that is left of it.
        specs: tree of `ParamSpec`; None derives the roles from the arrays, as
            `jaxlab.params.infer` does.

    Returns:
        A transformation whose `update` takes the parameters and ``stats`` too.

    Raises:
        ValueError: a setting outside its range; or, at `init` and `update`, trees that
            differ in a leaf, which is named, and statistics that are missing.

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
        return optax.chain(factors, lamb(learning_rate, specs=specs))
    return optax.chain(factors, base(learning_rate))


@dataclasses.dataclass(frozen=True)
class MKOR:
    """Settings of MKOR, and of the optimizer behind it."""

    base: LAMB | AdamW | SGD = LAMB()  # with the learning rate and the momentum
    variant: str = "released"  # or "exact"
    decay: float = 0.95  # memory of a factor
    period: int = 1  # steps between updates of the factors
    dtype: str = "bfloat16"  # of stored factors
    largest: int = 8192  # side of a factor
    excluded: tuple[str, ...] = ()  # patterns of matrices that the base has alone
    biases: tuple[tuple[str, str], ...] = ()  # patterns of weights, names of biases
    threshold: float = 10.0  # norm of an exact factor that mixes in the identity
    blend: float = 0.9  # share that is left of it
    switch: Switch | None = None  # MKOR-H: when to leave the factors

    def __post_init__(self):
        check(RANGES, **vars(self))

    def tapped(self, specs: Any) -> Any:
        """Tree of booleans: the weights whose taps the transformation takes."""
        return preconditioned(specs, self.excluded)

    def build(self, specs: Any, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation for parameters `specs` and a run of `steps`."""
        factors = scale_by_mkor(
            specs,
            variant=self.variant,
            decay=self.decay,
            period=self.period,
            dtype=jnp.dtype(self.dtype),
            largest=self.largest,
            excluded=self.excluded,
            biases=self.biases,
            threshold=self.threshold,
            blend=self.blend,
        )
        if self.switch is not None:
            factors = while_it_pays(factors, self.switch)
        return optax.chain(factors, self.base.build(specs, steps))


def _renewed(D, v, variant, decay, threshold, blend):
    """The next D from the vector v, and whether it is finite; both ``[*stack]``."""
    keep = decay if variant == "released" else 1.0
    u = v - keep * product(D, v[..., None])[..., 0]  # P v, or F v
    vu = jnp.sum(v * u, axis=-1)
    ok = jnp.isfinite(vu)
    outer = u[..., :, None] * u[..., None, :]
    if variant == "released":
        return decay * D + outer / (1 + vu)[..., None, None], ok
    eye = jnp.eye(D.shape[-1], dtype=D.dtype)[(None,) * (D.ndim - 2)]
    outer *= ((1 - decay) / (decay + (1 - decay) * vu))[..., None, None]
    new = (D - (1 - decay) * eye + outer) / decay
    norm = jnp.max(jnp.sum(jnp.abs(eye - new), axis=-1), axis=-1)
    mixed = jnp.where(norm > threshold, blend, 1.0)
    return mixed[..., None, None] * new, ok


def _between(g, lacks: Lacks):
    """A G B with the norm of G."""
    a, b = (x.astype(jnp.float32) for x in lacks)
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
    n_in: int  # with the bias's row
    n_out: int
    bias: str | None


def _weights(specs, excluded, biases, largest) -> dict[str, _Weight]:
    chosen = jax.tree.leaves(preconditioned(specs, excluded))
    named = named_leaves(specs)
    shapes = {name: spec.shape for name, spec in named}
    weights = {}
    for (name, spec), takes in zip(named, chosen, strict=True):
        if not takes:
            continue
        *stack, n_in, n_out = spec.shape
        bias = _bias_of(name, biases)
        if bias is not None and shapes.get(bias) != (*stack, n_out):
            raise ValueError(
                f"biases names {bias} as the bias of {name} {spec.shape}, but its "
                f"shape is {shapes.get(bias)} (None: there is no such parameter), and "
                f"must be {(*stack, n_out)}."
            )
        if max(n_in + (bias is not None), n_out) > largest:
            raise ValueError(
                f"{name} {spec.shape} would have a factor above largest={largest}, "
                "whose memory and time grow with its square; name it in `excluded`, or "
                "raise `largest`."
            )
        weights[name] = _Weight(tuple(stack), n_in + (bias is not None), n_out, bias)
    if not weights and not isinstance(specs, PLACEHOLDER):
        raise ValueError(
            f"No parameter is preconditioned: none of {len(named)} has the role "
            f"'matrix' and is not excluded by {tuple(excluded)}."
        )
    return weights


def _bias_of(name: str, biases) -> str | None:
    for pattern, replacement in biases:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return None


def _check_state(weights: dict[str, _Weight], lacks: dict[str, Lacks]) -> None:
    for name in {**lacks, **weights}:
        if name in lacks and name in weights:
            w, lack = weights[name], lacks[name]
            sides = (*w.stack, w.n_in, w.n_in), (*w.stack, w.n_out, w.n_out)
            if (lack.a.shape, lack.b.shape) == sides:
                continue
        raise ValueError(
            f"MKOR's state was made for parameters that differ from the updates in "
            f"{name!r}; give init and update trees of one structure."
        )


def _vectors(
    weights: dict[str, _Weight], names: Sequence[str], stats: Any
) -> dict[str, Lacks]:
    """The vectors of a step, in the place of the factors that they renew."""
    if stats is None:
        raise ValueError(
            "MKOR needs statistics: differentiate with respect to tap(params, "
            "preconditioned(params)), split the gradient by untap, and call "
            "update(gradient, state, params, stats=taps)."
        )
    pairs = jax.tree_util.tree_flatten_with_path(stats, is_leaf=_is_tap)[0]
    taps = {path_name(path): tap for path, tap in pairs if _is_tap(tap)}
    extra = [name for name in names if name in taps and name not in weights]
    if extra:
        raise ValueError(
            f"stats hold a tap for {', '.join(extra[:4])}, which is not "
            "preconditioned: tap(params, preconditioned(specs, excluded)) taps those "
            "that are."
        )
    vectors = {}
    for name, w in weights.items():
        tap = taps.get(name)
        if not isinstance(tap, Tap):
            raise ValueError(
                f"stats hold no tap for {name} (but {type(tap).__name__}), which is "
                "preconditioned; give a tree like the parameters with a Tap there, or "
                "name it in `excluded`."
            )
        shapes = (*w.stack, w.n_in - (w.bias is not None)), (*w.stack, w.n_out)
        if (tap.a.shape, tap.g.shape) != shapes:
            raise ValueError(
                f"The tap of {name} has a {tap.a.shape} and g {tap.g.shape}, but must "
                f"have {shapes[0]} and {shapes[1]}."
            )
        rows = jnp.maximum(tap.rows, 1.0)[..., None]
        a = (tap.a / rows).astype(jnp.float32)
        if w.bias:
            a = jnp.concatenate([a, jnp.ones((*w.stack, 1), jnp.float32)], axis=-1)
        vectors[name] = Lacks(a, tap.g.astype(jnp.float32))
    return vectors


def _is_tap(node: Any) -> bool:
    return isinstance(node, Tap)


def _check_variant(variant: str, decay: float, dtype: Any) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is not one of {VARIANTS}.")
    longest = 1 - float(jnp.finfo(dtype).eps)
    known = not isinstance(decay, Tracer)
    if variant == "released" and known and decay > longest:
        raise ValueError(
            f"decay={decay} is above {longest:.4g}, the longest memory of a factor in "
            f"{jnp.dtype(dtype).name}; store factors in float32."
        )
