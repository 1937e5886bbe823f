"""EGGROLL: evolution strategies whose members differ by matrices of low rank.

A generation draws P directions E_p and evaluates members at M + s sigma E_p, for s = 1
and, antithetically, s = -1. With weights z made of their fitness the gradient of the
expected fitness is

    g = 1 / (N sigma) sum_i z_i s_i E_i

over all N members, without a backward pass. A member's product with a matrix is
x M + (sigma / sqrt r)(x A) B^T: the population shares x M.

`es_value_and_grad` is the estimator alone, to replace `jax.value_and_grad`;
`EGGROLL.build` makes a strategy with `init`, `ask` and `tell`.

Differs from the paper in: the noise is new in each generation unless `noise_lifetime`
says otherwise, and the scale of its update is `scaling="paper"`.

Reference: Sarkar et al., Evolution Strategies at the Hyperscale, arXiv 2511.16652.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlab.evolution import noise, shaping
from jaxlab.params import (
    Quantized,
    infer,
    named_leaves,
    select,
    sketch_taps,
    value,
)

Fitness = Callable[..., Float[Array, ""]]


@struct.dataclass
class State:
    """The state of a strategy.

    Attributes:
        key: of the run; with the generation and a member's number it makes the noise.
        generation: the number of generations that have been told.
        optimizer: the state of the optax transformation.
    """

    key: Array
    generation: Int[Array, ""]
    optimizer: Any = None


@dataclasses.dataclass(frozen=True)
class Decay:
    """A sigma that falls: start * rate^generation, not below `least`."""

    start: float = 0.05
    rate: float = 0.999
    least: float = 1e-4

    def __post_init__(self):
        if not 0 < self.least <= self.start < math.inf or not 0 < self.rate <= 1:
            raise ValueError(
                f"{self} is not a step that falls: rate must be in (0, 1], and least "
                "above 0 (the gradient is divided by the step) and at most start."
            )

    def __call__(self, generation: Array) -> Array:
        t = jnp.asarray(generation, jnp.float32)
        return jnp.maximum(self.start * self.rate**t, self.least)


@dataclasses.dataclass(frozen=True)
class EGGROLL:
    """Settings of the strategy.

    Attributes:
        population: N, the members of a generation.
        rank: of a matrix's noise; None for a full normal, for comparison.
        sigma: the size of the step to a member, a number or a function of the
            generation, such as `Decay`.
        antithetic: whether members come in pairs of opposite noise.
        noise_lifetime: generations that share their directions.
        shape: turns fitness into weights; see `shaping`.
        scaling: "unbiased" for the gradient of the expected (shaped) fitness, "paper"
            for the published step, sigma^2 sqrt(N) times as long.
        frozen: roles, or patterns of path names, that get neither noise nor update.
        directions_at_once: directions whose noise is in memory together for the update.
        members_at_once: members that `step` evaluates together on each device; None
            for all.
        update: under a mesh, "replicated" if every device makes the whole update,
            "sharded" if each sums the part of its own members.
        axes: the mesh axes that divide the population.
    """

    population: int = 512
    rank: int | None = 1
    sigma: float | Callable[[Array], Array] = 0.05
    antithetic: bool = True
    noise_lifetime: int = 1
    shape: shaping.Shaping = shaping.ZScore()
    scaling: str = "unbiased"
    frozen: tuple[str, ...] = ()
    directions_at_once: int = 1024
    members_at_once: int | None = None
    update: str = "replicated"
    axes: tuple[str, ...] = ("data", "fsdp")

    def __post_init__(self):
        if self.antithetic and self.population % 2:
            raise ValueError(
                f"population is {self.population}, but must be even: antithetic "
                "members come in pairs; add one, or set antithetic=False."
            )
        if self.population < 2:
            raise ValueError(
                f"population is {self.population}, but must be at least 2: one member "
                "has nobody to differ from."
            )
        if self.rank is not None and self.rank < 1:
            raise ValueError(
                f"rank is {self.rank}, but must be at least 1, or None for full noise."
            )
        if not callable(self.sigma) and not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma is {self.sigma}, but must be above 0.")
        for name in ("noise_lifetime", "directions_at_once", "members_at_once"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}, but must be at least 1.")
        if isinstance(self.shape, shaping.GroupZScore):
            self.shape.check(self.population)
        if isinstance(self.shape, shaping.Sign) and not self.antithetic:
            raise ValueError("Sign compares antithetic pairs; set antithetic=True.")
        for name, known in (
            ("scaling", ("unbiased", "paper")),
            ("update", ("replicated", "sharded")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but must be one of {known}."
                )

    @property
    def members_of_direction(self) -> int:
        """1, or 2 where members come in pairs."""
        return 2 if self.antithetic else 1

    @property
    def directions(self) -> int:
        """P: the number of directions, which pairs of opposite members share."""
        return self.population // self.members_of_direction

    def sigma_of(self, generation: Int[Array, ""]) -> Float[Array, ""]:
        """Return the size of the step in a generation."""
        sigma = self.sigma(generation) if callable(self.sigma) else self.sigma
        return jnp.asarray(sigma, jnp.float32)

    def build(
        self, specs: Any, optimizer: optax.GradientTransformation, tapped: Any = None
    ) -> "Strategy":
        """Return the strategy for parameters `specs`, which maximises by `optimizer`.

        Args:
            specs: tree of `ParamSpec`, or of arrays: `params.infer` derives theirs.
            optimizer: an optax transformation. It is given minus the gradient, and as
                ``value`` minus the mean of the finite fitness.
            tapped: tree of booleans, the weights whose statistics the optimizer takes,
                as MKOR does; None for none. They are sketches of the estimated
                gradient (`jaxlab.params.sketch_taps`), since no product reports them.

        Raises:
            ValueError: no parameter can be moved.
        """
        taps = None if tapped is None else tuple(jax.tree.leaves(tapped))
        return Strategy(self, _Directions.of(self, specs), optimizer, taps)


@dataclasses.dataclass(frozen=True)
class _Directions:
    """The directions along which parameters can move.

    Attributes:
        es: settings.
        specs: tree of `ParamSpec`.
        moved: tree of booleans.
    """

    es: EGGROLL
    specs: Any
    moved: Any

    @classmethod
    def of(cls, es: EGGROLL, specs: Any):
        specs = infer(specs)
        rules = [*((pattern, False) for pattern in es.frozen), (".*", True)]
        moved = select(specs, rules)
        named = named_leaves(specs)
        for (name, spec), moves in zip(named, jax.tree.leaves(moved), strict=True):
            if moves and not jnp.issubdtype(spec.dtype, jnp.floating):
                raise ValueError(
                    f"{name} is {jnp.dtype(spec.dtype).name}, which no noise can move; "
                    "name it in `frozen`, or make it floating-point."
                )
        if not any(jax.tree.leaves(moved)):
            raise ValueError(
                f"Nothing can be moved: frozen={es.frozen} names each of the "
                f"{len(named)} parameters, such as {named[0][0]}."
            )
        return cls(es, specs, moved)

    def noise(self, state: State, numbers: Int[Array, " P"]) -> Any:
        """Draw the noise of directions, stacked along a leading axis."""
        era = state.generation // self.es.noise_lifetime
        draw = partial(
            noise.direction, self.specs, self.moved, self.es.rank, state.key, era
        )
        return jax.vmap(draw)(numbers)

    def members(self, state: State, params: Any, numbers: Int[Array, " n"]):
        """Return trees of parameters stacked over members, and their `in_axes`."""
        each = self.es.members_of_direction
        sign = jnp.where(numbers % each == 0, 1.0, -1.0)
        drawn = self.noise(state, numbers // each)
        axes = noise.axes(drawn)
        move = jax.vmap(noise.moved_by, in_axes=(None, 0, 0), out_axes=axes)
        return move(params, drawn, sign * self.es.sigma_of(state.generation)), axes

    def map(self, function, state: State, params: Any, numbers: Int[Array, " n"], *own):
        """Map `function` over the members of directions, whose noise is drawn once.

        Args:
            own: trees of further arguments, one of each for every member.
        """
        each, sigma = self.es.members_of_direction, self.es.sigma_of(state.generation)
        drawn = self.noise(state, numbers)
        own = jax.tree.map(lambda x: x.reshape(-1, each, *x.shape[1:]), own)

        def member(scale, e, *own):
            return function(noise.moved_by(params, e, scale), *own)

        # The map over signs is the outer one: both members share their factors, and
        # what is computed with them runs along the many directions, not along the pair.
        one = jax.vmap(member, (None, 0, *(0 for _ in own)))
        both = jax.vmap(one, (0, None, *(1 for _ in own)), out_axes=1)
        results = both(sigma * jnp.asarray([1.0, -1.0][:each]), drawn, *own)
        return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), results)

    def gradient(self, state: State, z: Float[Array, " N"], first: Any = 0, count=None):
        """Return sum_i z_i s_i E_i, scaled, over the directions from `first` on.

        Args:
            z: weights of all members.
            count: the number of directions; None for all.
        """
        es, count = self.es, self.es.directions if count is None else count
        if es.antithetic:
            z = z[0::2] - z[1::2]
        at_once = min(es.directions_at_once, count)
        steps = -(-count // at_once)

        def add(total, step):
            numbers = step * at_once + jnp.arange(at_once)
            weights = jnp.where(numbers < count, z[(first + numbers) % len(z)], 0.0)
            part = noise.weighted_sum(self.noise(state, first + numbers), weights)
            return jax.tree.map(jnp.add, total, part), None

        zeros = jax.tree.map(
            lambda spec, moves: jnp.zeros(spec.shape) if moves else None,
            self.specs,
            self.moved,
        )
        total, _ = jax.lax.scan(add, zeros, jnp.arange(steps))
        sigma, N = es.sigma_of(state.generation), es.population
        scale = 1 / (N * sigma) if es.scaling == "unbiased" else sigma / math.sqrt(N)
        return jax.tree.map(
            lambda spec, g: jnp.zeros(spec.shape) if g is None else scale * g,
            self.specs,
            total,
        )


@dataclasses.dataclass(frozen=True)
class Strategy:
    """`init`, `ask` and `tell`: pure functions of a state."""

    es: EGGROLL
    _directions: _Directions
    optimizer: optax.GradientTransformation
    tapped: tuple[bool, ...] | None = None  # the leaves of the tree

    def init(self, params: Any, key: Array) -> State:
        """Return the state before the first generation.

        Warns of parameters whose dtype cannot hold a step of sigma.

        Raises:
            ValueError: a parameter is neither an array nor `Quantized`.
        """
        leaves = _by_name(self._directions, params)
        for name, w in leaves.items():
            if not isinstance(w, Array | np.ndarray | Quantized):
                raise ValueError(
                    f"{name} is a {type(w).__name__}, to which no step can be added: "
                    "give value(w), or take es_value_and_grad and add it yourself."
                )
        _warn_of_resolution(self.es, self._directions, leaves)
        dense = jax.tree.map(lambda spec, w: value(w), self._directions.specs, params)
        return State(key, jnp.zeros((), jnp.int32), self.optimizer.init(dense))

    def ask(self, state: State, params: Any, members: Int[Array, " n"] | None = None):
        """Return members' parameters, stacked, and the `in_axes` for `jax.vmap`.

        Args:
            members: their numbers, below the population; None for all.
        """
        members = jnp.arange(self.es.population) if members is None else members
        return self._directions.members(state, params, members)

    def map(self, function: Callable, state: State, params: Any, *own: Any) -> Any:
        """Return `function(params, *own)` of every member, stacked in their order.

        Equals `jax.vmap` over what `ask` gives, but the two members of a pair share
        their noise, which is drawn and read once.

        Args:
            own: trees of further arguments, stacked over members.
        """
        everyone = jnp.arange(self.es.directions)
        return self._directions.map(function, state, params, everyone, *own)

    def tell(
        self, state: State, params: Any, fitness: Float[Array, " N"]
    ) -> tuple[State, Any, dict[str, Array]]:
        """Return the next state and parameters, and figures of the generation.

        Args:
            fitness: of all members in order; greater is better.

        Raises:
            ValueError: fitness has another shape; or, outside of `jax.jit`, none of it
                is finite or all of it is equal.
        """
        fitness = jnp.asarray(fitness).astype(jnp.float32)
        _check_fitness(self.es, fitness)
        g = self._directions.gradient(state, _weights(self.es, fitness))
        reported = figures(fitness)
        return *self._ascend(g, state, params, reported), reported

    def step(self, state: State, params: Any, evaluate: Fitness, *args: Any):
        """Run one generation, divided over the mesh in use; results as from `tell`.

        Args:
            evaluate: (params, key, *args) to the fitness of one member; the two members
                of an antithetic pair get the same key.
        """
        _, g, reported = _estimate(self._directions, evaluate, state, params, args)
        return *self._ascend(g, state, params, reported), reported

    def _ascend(
        self, g: Any, state: State, params: Any, reported: dict[str, Array]
    ) -> tuple[State, Any]:
        """Return the next state, and the parameters after a step up the gradient."""
        dense = jax.tree.map(lambda g, w: value(w), g, params)
        down = jax.tree.map(lambda g, w: -g.astype(w.dtype), g, dense)
        key = jax.random.fold_in(state.key, ~state.generation)
        leaves, structure = jax.tree.flatten(self._directions.moved)
        keys = jax.random.split(key, len(leaves))
        extra: dict[str, Any] = {"value": -reported["fitness"]}
        if self.tapped is not None:
            where = structure.unflatten(self.tapped)
            extra["stats"] = sketch_taps(down, where, jax.random.fold_in(key, 1))
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            updates, memory = optax.with_extra_args_support(self.optimizer).update(
                down, state.optimizer, dense, **extra
            )
            new = map(
                _added,
                structure.flatten_up_to(params),
                leaves,
                structure.flatten_up_to(updates),
                keys,
            )
            params = structure.unflatten(new)
        return State(state.key, state.generation + 1, memory), params


def es_value_and_grad(function: Fitness, es: EGGROLL, specs: Any):
    """Return a function that estimates value and gradient, as `jax.value_and_grad`.

    Args:
        function: (params, key, *args) to a number.
        es: settings.
        specs: tree of `ParamSpec`, or of arrays: `params.infer` derives theirs.

    Returns:
        A function of (params, state, *args) to the mean of `function` over the members,
        its gradient at `params` as far as `es.shape` keeps it, and figures. The state's
        generation makes the noise; the caller increments it.
    """
    directions = _Directions.of(es, specs)

    def value_and_grad(params: Any, state: State, *args: Any):
        return _estimate(directions, function, state, params, args)

    return value_and_grad


def figures(fitness: Float[Array, " N"]) -> dict[str, Array]:
    """Summarise a generation's fitness; ``no_signal`` is 1 where all are equal."""
    finite = jnp.isfinite(fitness)
    best = jnp.where(finite.any(), shaping.finite(fitness), jnp.nan)
    return {
        "fitness": best.mean(),
        "fitness_best": best.max(),
        "fitness_deviation": best.std(),
        "not_finite": jnp.sum(~finite),
        "no_signal": (~shaping.informative(fitness)).astype(jnp.float32),
    }


def _estimate(directions: _Directions, function, state, params, args):
    """Evaluate all members and estimate the gradient; devices of a mesh share the work.

    Returns:
        The mean fitness, the gradient, and figures.
    """
    es = directions.es
    what = f"directions of a population of {es.population}"
    names, parts = noise.divided(es.axes, es.directions, what)
    count = es.directions // parts

    def part(state, params, args, first):
        """Evaluate the members of `count` directions, in their order."""
        numbers = first + jnp.arange(count)
        return _fitness(directions, function, state, params, args, numbers)

    if parts == 1:
        fitness = part(state, params, args, 0)
        _check_fitness(es, fitness)
        g = directions.gradient(state, _weights(es, fitness))
        return fitness.mean(), g, figures(fitness)

    @partial(
        jax.shard_map,
        in_specs=(PartitionSpec(),) * 3,
        out_specs=PartitionSpec(),
        axis_names=set(names),
        check_vma=False,  # every device computes the same from what was gathered
    )
    def on_device(state, params, args):
        first = jax.lax.axis_index(names) * count
        own = part(state, params, args, first)
        fitness = jax.lax.all_gather(own, names, tiled=True)
        z = _weights(es, fitness)
        if es.update == "replicated":
            return fitness, directions.gradient(state, z)
        own = directions.gradient(state, z, first, count)
        return fitness, jax.lax.psum(own, names)

    fitness, g = on_device(state, params, args)
    return fitness.mean(), g, figures(fitness)


def _fitness(directions: _Directions, function, state, params, args, numbers):
    """Evaluate the members of directions, at most `members_at_once` at a time."""
    es = directions.es
    each = es.members_of_direction
    key = jax.random.fold_in(state.key, state.generation)

    def together(numbers):
        keys = jnp.repeat(jax.vmap(partial(jax.random.fold_in, key))(numbers), each)

        def evaluate(w, key):
            return function(w, key, *args)

        found = directions.map(evaluate, state, params, numbers, keys)
        if found.ndim != 1:
            raise ValueError(
                f"The fitness of one member has shape {found.shape[1:]}, but must be "
                "one number; take its mean."
            )
        return found.astype(jnp.float32)

    at_once = -(-(es.members_at_once or es.population) // each)
    whole, rest = divmod(len(numbers), at_once)
    first, last = jnp.split(numbers, [whole * at_once])
    found = [together(last)] if rest else []
    if whole:
        first = jax.lax.map(together, first.reshape(whole, at_once))
        found = [first.reshape(-1), *found]
    return jnp.concatenate(found)


def _added(w: Any, moves: bool, update: Array, key: Array) -> Any:
    """Update a parameter; a quantised one rounds up or down at random, unbiased."""
    if not moves:
        return w
    if not isinstance(w, Quantized):
        return optax.apply_updates(w, update)
    steps = jnp.floor(update / w.scale + jax.random.uniform(key, update.shape))
    q = jnp.clip(w.q.astype(jnp.float32) + steps, -127, 127)
    return Quantized(q.astype(w.q.dtype), w.scale)


def _weights(es: EGGROLL, fitness: Float[Array, " N"]) -> Float[Array, " N"]:
    """Return the members' weights, all exactly 0 where all have the same fitness."""
    return jnp.where(shaping.informative(fitness), es.shape(fitness), 0.0)


def _check_fitness(es: EGGROLL, fitness) -> None:
    if fitness.shape != (es.population,):
        raise ValueError(
            f"fitness has shape {fitness.shape}, but a population of {es.population} "
            f"has one number a member, ({es.population},)."
        )
    if isinstance(fitness, Tracer):
        return
    known = np.asarray(fitness)
    if not np.isfinite(known).any():
        raise ValueError(
            f"None of the {es.population} members has a finite fitness; make sigma "
            "smaller, or look at the fitness of the parameters themselves."
        )
    if not bool(shaping.informative(fitness)):
        raise ValueError(
            f"All {es.population} members have the fitness {known[0]}, so there is no "
            "direction; make sigma larger, or the fitness finer."
        )


def _by_name(directions: _Directions, params: Any) -> dict[str, Any]:
    """Return the parameters by their paths; a quantised weight is one of them."""
    structure = jax.tree.structure(directions.specs)
    names = [name for name, _ in named_leaves(directions.specs)]
    return dict(zip(names, structure.flatten_up_to(params), strict=True))


def _warn_of_resolution(es: EGGROLL, directions: _Directions, leaves: dict) -> None:
    with jax.ensure_compile_time_eval():  # also while `init` is traced
        sigma = float(es.sigma_of(jnp.zeros((), jnp.int32)))
    coarse = []
    moved = jax.tree.leaves(directions.moved)
    for (name, w), moves in zip(leaves.items(), moved, strict=True):
        if not moves or isinstance(w, Tracer | Quantized):
            continue
        size = float(jnp.sqrt(jnp.mean(jnp.square(w.astype(jnp.float32)))))
        step = size * float(jnp.finfo(w.dtype).eps)
        if sigma < step:
            coarse.append(
                f"{name} ({w.dtype}, entries of about {size:.2g}: {step:.2g})"
            )
    if coarse:
        warnings.warn(
            f"sigma is {sigma:g}, below the resolution of {', '.join(coarse)}: steps "
            "like it are rounded away. Keep them in float32, or make sigma larger.",
            stacklevel=3,
        )
