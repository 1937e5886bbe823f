"""What an optimizer costs before it runs.

Bytes are found from shapes alone; nothing is allocated. Exchanged bytes are what each
device hands to sums over devices, and gets back: all-reduces. A ring of n devices sends
2 (n - 1) / n times as many from each.
"""

import dataclasses
import math
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh

from jaxlab.optimizers.placement import abstract_opt_state
from jaxlab.params import ParamSpec, abstract, axis_names, partition_spec, shardings

FLOAT32 = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Costs:
    """Bytes of an optimizer and of a training step by it.

    Attributes:
        parameters: of all parameters; what several devices have counts once.
        state: of the optimizer's state, likewise.
        state_a_device: of the part of the state that one device has.
        gradients: that a device exchanges a step: its part of the gradients, summed
            with the devices that have copies of its parameters. A table of embeddings
            that is also the head has a gradient for each of its uses, and both are
            summed, which here counts once.
        statistics: that a device exchanges a step besides: the taps, summed with all
            devices that have other tokens.
    """

    parameters: int
    state: int
    state_a_device: int
    gradients: int
    statistics: int

    @property
    def exchanged(self) -> int:
        """Gradients and statistics."""
        return self.gradients + self.statistics


def state_bytes(optimizer: optax.GradientTransformation, specs: Any) -> int:
    """Bytes of an optimizer's state for parameters `specs`, over all devices.

    Found from shapes alone; nothing is allocated. A state that is the same on several
    devices counts once.

    Args:
        optimizer: any optax transformation.
        specs: tree of `ParamSpec`.
    """
    return _bytes(jax.eval_shape(optimizer.init, abstract(specs)))


def costs(
    optimizer: optax.GradientTransformation,
    specs: Any,
    mesh: Mesh | AbstractMesh,
    accumulate: int = 1,
    tapped: Any = None,
) -> Costs:
    """The costs of an optimizer in `jaxlab.training.make_train_step`.

    For a weight [in, out] the statistics are in + out + 1 numbers, at every step,
    whatever MKOR's period: linear in its sides, where K-FAC's are quadratic.
    On a mesh of the axis "data" alone there is nothing else but two or three numbers,
    sums of the loss and of its weights. Where devices split parameters
    or time they also exchange parameters and activations, and an optimizer that
    multiplies matrices parts of these, as the compiler sees fit; that is not counted.

    Args:
        optimizer: any optax transformation.
        specs: tree of `ParamSpec`.
        mesh: of `make_mesh`, or an abstract one with its axes, which needs no devices.
        accumulate: parts of a batch; each is exchanged by itself.
        tapped: tree of booleans, the weights whose taps the optimizer takes, as
            `MKOR.tapped` gives them; None for none, and no statistics.
    """
    taps = [] if tapped is None else _chosen(specs, tapped)
    state = abstract_opt_state(optimizer, specs, mesh)
    return Costs(
        parameters=_bytes(abstract(specs)),
        state=_bytes(state),
        state_a_device=sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(state)
        ),
        gradients=accumulate * _gradient_bytes(specs, mesh),
        statistics=accumulate * sum(_tap_bytes(spec, mesh) for spec in taps),
    )


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _chosen(specs, tapped) -> list[ParamSpec]:
    pairs = zip(jax.tree.leaves(specs), jax.tree.leaves(tapped), strict=True)
    return [spec for spec, taps in pairs if taps]


def _gradient_bytes(specs, mesh) -> int:
    placed = jax.tree.leaves(shardings(specs, mesh))
    found = 0
    for x, sharding in zip(jax.tree.leaves(abstract(specs)), placed, strict=True):
        if _devices(mesh, _of_tokens() - _names(sharding.spec)) > 1:  # has copies
            found += math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return found


def _tap_bytes(spec: ParamSpec, mesh) -> int:
    """Of one weight's a, g and rows."""
    if _devices(mesh, _of_tokens()) == 1:
        return 0
    *stack, n_in, n_out = spec.shape
    of_in, of_out = (
        _devices(mesh, _names(partition_spec([axis])) - _of_tokens())
        for axis in spec.axes[-2:]
    )
    return FLOAT32 * math.prod(stack) * (n_in // of_in + n_out // of_out + 1)


def _of_tokens() -> set[str]:
    """Mesh axes whose devices have other tokens."""
    return _names(partition_spec(("batch", "time")))


def _names(entries) -> set[str]:
    """The mesh axes of a partition."""
    return {name for entry in entries for name in axis_names(entry)}


def _devices(mesh, names: set[str]) -> int:
    return math.prod(mesh.shape[name] for name in names)
