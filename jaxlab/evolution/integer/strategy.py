"""EGGROLL in integers: a language model trained without one floating-point number.

Members come in pairs theta + E_p, theta - E_p that read the same text. A pair only says
which of the two did better, F_p = sign(s+ - s-), and an entry of theta moves by one
where the P pairs agree more than they would by chance:

    V = sum_p F_p E_p,   theta <- sat(theta + sign(V))  where  |V| >= 256 sqrt(P) z_t

The noise of a matrix is a b^T with a and b drawn as round(16 N(0, 1)), so 256 sqrt(P)
is the standard deviation of V if no pair has a preference. The threshold
z_t = Phi^-1(1 - alpha_t / 2) then moves the share alpha_t = 1 / (decay t + 1) of all
entries. Members keep the state of the recurrence from one segment of their text to the
next.

Differs from the paper in: noise is rounded, not truncated, so that 256 is its variance,
and clipped at 63, which keeps every sum in 32 bits; directions are stretches of a
table, as there, but of `table_size` entries, not 2^30, made from the run's key and
closed to a ring, so that all starts are alike; a pair's vote is counted where it is
cast, so that no noise is made twice; and alpha follows `decay`, which is 0.015 in the
published run.

Reference: Sarkar et al., Evolution Strategies at the Hyperscale, arXiv 2511.16652,
appendices on integer training.
"""

import dataclasses
import math
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int8, Int32

from jaxlab.evolution.integer.integer_model import (
    FIXED_POINT,
    LARGEST,
    ONE,
    Config,
    Perturbed,
    init_state,
    saturate,
    segment_loss,
    spec,
)
from jaxlab.evolution.noise import LOW_RANK_ROLES, divided
from jaxlab.params import ParamSpec, named_leaves

LARGEST_NOISE = 63
MOST_MEMBERS = 2**20  # so that the sum of their votes, of 63^2 each, fits int32
TEXTS = "texts that a population reads"


@struct.dataclass
class IntegerState:
    """The state of a strategy.

    Attributes:
        key: of the run; with the generation and a direction's number it makes noise.
        generation: the number of generations so far.
        hidden: each member's state of the recurrence.
        table: the noise, of which each direction is a stretch; its first entries are
            repeated at its end.
    """

    key: Array
    generation: Int32[Array, ""]
    hidden: Int8[Array, "pairs 2 L 1 D"]
    table: Int8[Array, " entries"]


class Outer(NamedTuple):
    """The noise a b^T of a matrix."""

    a: Int8[Array, "*stack in"]
    b: Int8[Array, "*stack out"]


class Product(NamedTuple):
    """The noise a b of a vector, entry by entry: distributed as that of a matrix."""

    a: Int8[Array, "*stack D"]
    b: Int8[Array, "*stack D"]


Noise = Outer | Product


@dataclasses.dataclass(frozen=True)
class IntegerEGGROLL:
    """Settings of the strategy.

    Attributes:
        population: members of a generation, an even number.
        sigma_shift: a member differs by 2^-sigma_shift of its noise, whose standard
            deviation is that of new weights.
        members_per_sequence: consecutive members that read the same text; even, so that
            the two of a pair do.
        decay: lowers the share of entries that a generation may move by chance,
            1 / (decay t + 1).
        generations: the t up to which that share falls.
        members_at_once: the most members whose activations are in memory together; the
            pairs are divided evenly, so a population with small factors is best.
        table_size: entries of noise, a power of 2.
        axes: the mesh axes that divide the population; devices exchange their votes.
    """

    population: int = 1024
    sigma_shift: int = 4
    members_per_sequence: int = 16
    decay: float = 0.015
    generations: int = 2**15
    members_at_once: int = 128
    table_size: int = 2**22
    axes: tuple[str, ...] = ("data", "fsdp")

    def __post_init__(self):
        if self.population % 2 or not 2 <= self.population <= MOST_MEMBERS:
            raise ValueError(
                f"population is {self.population}, but members come in pairs of "
                f"opposite noise: make it even, from 2 to {MOST_MEMBERS}."
            )
        shared = self.members_per_sequence
        if shared < 2 or shared % 2:
            raise ValueError(
                f"members_per_sequence is {shared}, but must be even and at least 2: "
                "the two of a pair read the same text."
            )
        if self.population % shared:
            raise ValueError(
                f"members_per_sequence is {shared}, which does not divide a population "
                f"of {self.population}; choose an even divisor of it."
            )
        if self.members_at_once < 2:
            raise ValueError(
                f"members_at_once is {self.members_at_once}, but must be at least 2, "
                "a pair."
            )
        if not 0 <= self.sigma_shift <= 16:
            raise ValueError(
                f"sigma_shift is {self.sigma_shift}, but must be 0 to 16: it divides "
                "noise by as many powers of 2."
            )
        if not self.decay >= 0 or not math.isfinite(self.decay):
            raise ValueError(f"decay is {self.decay}, but must be at least 0.")
        if self.generations < 1:
            raise ValueError(
                f"generations is {self.generations}, but must be at least 1."
            )
        if self.table_size < 2 or self.table_size & (self.table_size - 1):
            raise ValueError(
                f"table_size is {self.table_size}, but must be a power of 2, so that "
                "random bits are a uniform start in it."
            )

    @property
    def pairs(self) -> int:
        """P, the number of pairs."""
        return self.population // 2

    def at_once(self, pairs: int) -> int:
        """Return the most pairs within `members_at_once` that divide `pairs`."""
        most = min(self.members_at_once // 2, pairs)
        return next(n for n in range(most, 0, -1) if pairs % n == 0)

    def share(self, generation: int) -> float:
        """Return alpha, the share of entries that move if no pair has a preference."""
        return 1 / (self.decay * min(generation, self.generations - 1) + 1)

    def threshold(self, generation: int) -> int:
        """The fewest votes that move an entry: 256 sqrt(P) Phi^-1(1 - alpha / 2)."""
        z = -statistics.NormalDist().inv_cdf(self.share(generation) / 2)
        return math.ceil(ONE**2 * math.sqrt(self.pairs) * z)

    def build(self, cfg: Config) -> "IntegerStrategy":
        """Return the strategy for a model.

        Raises:
            ValueError: the table is shorter than the noise of one direction.
        """
        shapes = jax.tree.map(_shapes, spec(cfg))
        length = sum(math.prod(s) for s in jax.tree.leaves(shapes, is_leaf=_is_shape))
        if length > self.table_size:
            raise ValueError(
                f"table_size is {self.table_size}, but one direction takes {length} "
                "entries of noise; make the table longer."
            )
        thresholds = np.array([self.threshold(t) for t in range(self.generations)])
        return IntegerStrategy(self, cfg, shapes, length, thresholds.astype(np.int32))


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerStrategy:
    """`init` and `step`: pure functions of a state."""

    es: IntegerEGGROLL
    cfg: Config
    _shapes: Any  # tree of Noise, of shapes
    _length: int  # of one direction's noise
    _thresholds: Int32[np.ndarray, " generations"]

    def init(self, params: Any, key: Array) -> IntegerState:
        """Return the state before the first generation; floats make only its table.

        Raises:
            TypeError: a parameter is not int8.
            ValueError: a parameter has another shape than `spec`, or holds -128.
        """
        _check(params, spec(self.cfg))
        noise = jax.random.normal(jax.random.fold_in(key, 1), (self.es.table_size,))
        table = jnp.clip(jnp.round(ONE * noise), -LARGEST_NOISE, LARGEST_NOISE)
        table = table.astype(jnp.int8)
        state = init_state(self.cfg, 1)
        return IntegerState(
            jax.random.fold_in(key, 0),
            jnp.zeros((), jnp.int32),
            jnp.broadcast_to(state, (self.es.pairs, 2, *state.shape)),
            jnp.concatenate([table, table[: self._length]]),
        )

    def noise(self, state: IntegerState, number: Int32[Array, ""]) -> Any:
        """Return one direction of the generation, a tree of `Noise` like the spec."""
        key = jax.random.fold_in(state.key, state.generation)
        start = jax.random.bits(jax.random.fold_in(key, number), (), jnp.uint32)
        start = (start & jnp.uint32(self.es.table_size - 1)).astype(jnp.int32)
        drawn = jax.lax.dynamic_slice(state.table, (start,), (self._length,))
        shapes, structure = jax.tree.flatten(self._shapes, is_leaf=_is_shape)
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        parts = jnp.split(drawn, ends[:-1])
        parts = [part.reshape(s) for part, s in zip(parts, shapes, strict=True)]
        return jax.tree.unflatten(structure, parts)

    def member(self, params: Any, noise: Any, sign: Int8[Array, ""]) -> Any:
        """Return the parameters of a member: `Perturbed` leaves that share their base.

        Args:
            params: tree of int8 arrays.
            noise: of its pair.
            sign: 1 for the first of the pair, -1 for the second.
        """
        shift = FIXED_POINT + self.es.sigma_shift
        return jax.tree.map(
            lambda e, w: Perturbed(w, sign * e.a, e.b, shift),
            noise,
            params,
            is_leaf=_is_noise,
        )

    def step(
        self, state: IntegerState, params: Any, tokens: Int32[Array, "rows T+1"]
    ) -> tuple[IntegerState, Any, dict[str, Array]]:
        """Run one generation.

        Args:
            tokens: a text for every `members_per_sequence` members: the segment that
                follows that of the step before, whose last token is its first.

        Returns:
            The next state, the next parameters, and figures: `losses` [pairs, 2] of the
            members in sixteenths of a bit, the number of `undecided` pairs, and the
            number of entries that `moved`.

        Raises:
            ValueError: the number of rows is wrong, or there is nothing to predict.
        """
        tokens = self._checked(jnp.asarray(tokens))
        names, parts = divided(self.es.axes, len(tokens), TEXTS)

        def part(state, params, hidden, tokens):
            first = jax.lax.axis_index(names) * len(hidden) if names else 0
            votes, *found = self._votes(state, params, hidden, tokens, first)
            return jax.lax.psum(votes, names) if names else votes, *found

        if parts > 1:
            replicated, split = PartitionSpec(), PartitionSpec(names)
            part = jax.shard_map(
                part,
                in_specs=(replicated, replicated, split, split),
                out_specs=(replicated, split, split),
                axis_names=set(names),
                check_vma=False,  # the sum of votes is the same on every device
            )
        shared = dataclasses.replace(state, hidden=None)
        votes, losses, hidden = part(shared, params, state.hidden, tokens)

        last = len(self._thresholds) - 1
        threshold = jnp.asarray(self._thresholds)[jnp.minimum(state.generation, last)]
        moves = elect(votes, threshold)
        figures = {
            "losses": losses,
            "undecided": _count(preferences(losses) == 0),
            "moved": sum(_count(move != 0) for move in jax.tree.leaves(moves)),
        }
        state = IntegerState(state.key, state.generation + 1, hidden, state.table)
        return state, jax.tree.map(_moved, params, moves), figures

    def _votes(self, state, params, hidden, tokens, first):
        """Return the pairs' votes, losses and next states; they count from `first`."""
        pairs, pairs_a_row = len(hidden), self.es.members_per_sequence // 2
        at_once = self.es.at_once(pairs)

        def chunk(votes, given):
            start, hidden = given
            numbers = start + jnp.arange(at_once)
            noise = jax.vmap(self.noise, (None, 0))(state, first + numbers)
            evaluate = jax.vmap(self._pair, (None, 0, 0, 0))
            texts = tokens[numbers // pairs_a_row]
            losses, hidden = evaluate(params, noise, texts, hidden)
            new_votes = count_votes(noise, preferences(losses))
            return jax.tree.map(jnp.add, votes, new_votes), (losses, hidden)

        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.int32), params)
        stacked = hidden.reshape(-1, at_once, *hidden.shape[1:])
        given = jnp.arange(0, pairs, at_once), stacked
        votes, (losses, after) = jax.lax.scan(chunk, zeros, given)
        return votes, losses.reshape(pairs, 2), after.reshape(hidden.shape)

    def _pair(self, params, noise, tokens, hidden):
        """Return the losses [2] and hidden states of two members of opposite noise."""

        def one(sign, hidden):
            member = self.member(params, noise, sign)
            losses, hidden = segment_loss(member, tokens[None], self.cfg, hidden)
            return losses[0], hidden

        return jax.vmap(one)(jnp.array([1, -1], jnp.int8), hidden)

    def _checked(self, tokens):
        rows = self.es.population // self.es.members_per_sequence
        if tokens.ndim != 2 or tokens.shape[0] != rows or tokens.shape[1] < 2:
            raise ValueError(
                f"tokens have the shape {tokens.shape}, but {self.es.population} "
                f"members with {self.es.members_per_sequence} a text read [{rows}, "
                "T + 1] of them, with T at least 1."
            )
        return tokens


def preferences(losses: Int32[Array, "pairs 2"]) -> Int8[Array, " pairs"]:
    """Return F: 1 where the first of a pair did better, -1 where the second, else 0."""
    return jnp.sign(losses[:, 1] - losses[:, 0]).astype(jnp.int8)


def count_votes(noise: Any, preference: Int8[Array, " pairs"]) -> Any:
    """Return V = sum_p F_p E_p, int32.

    Args:
        noise: of all pairs, stacked along a leading axis.
        preference: F.
    """

    def one(e: Noise):
        a = e.a * preference.reshape(-1, *(1,) * (e.a.ndim - 1))
        sums = "p...i,p...o->...io" if isinstance(e, Outer) else "p...,p...->..."
        return jnp.einsum(sums, a, e.b, preferred_element_type=jnp.int32)

    return jax.tree.map(one, noise, is_leaf=_is_noise)


def elect(votes: Any, threshold: Int32[Array, ""]) -> Any:
    """Return sign(V) where |V| reaches the threshold, else 0; int32."""
    return jax.tree.map(
        lambda v: jnp.where(jnp.abs(v) >= threshold, jnp.sign(v), 0),
        votes,
    )


def _shapes(spec: ParamSpec) -> Any:
    """Return the shapes of a parameter's noise."""
    if spec.role in LOW_RANK_ROLES:
        *stack, n_in, n_out = spec.shape
        return Outer((*stack, n_in), (*stack, n_out))  # pyright: ignore
    return Product(spec.shape, spec.shape)  # pyright: ignore


def _is_shape(x: Any) -> bool:
    return type(x) is tuple


def _is_noise(x: Any) -> bool:
    return isinstance(x, Outer | Product)


def _count(condition) -> Int32[Array, ""]:
    return jnp.sum(condition.astype(jnp.int32))


def _moved(w, move):
    return saturate(w.astype(jnp.int32) + move)


def _check(params: Any, specs: Any) -> None:
    leaves = jax.tree.leaves(params)
    for (name, declared), w in zip(named_leaves(specs), leaves, strict=True):
        if w.dtype != jnp.int8:
            raise TypeError(
                f"{name} is {w.dtype}, but the weights of this model are int8; make "
                "them with params.init(spec(cfg), key)."
            )
        if w.shape != declared.shape:
            raise ValueError(
                f"{name} has the shape {w.shape}, but the settings need "
                f"{declared.shape}."
            )
        if not isinstance(w, Tracer) and int(jnp.min(w)) < -LARGEST:
            raise ValueError(
                f"{name} holds -128, which is not allowed, as it has no opposite; "
                "saturate it to -127."
            )
