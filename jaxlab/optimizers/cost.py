"""The memory and communication of an optimizer, computed before it runs.

Bytes are computed from shapes alone; nothing is allocated. Exchanged bytes are the size
of each device's operands in sums over devices (all-reduces). In a ring of n devices
each sends 2 (n - 1) / n times as many.
"""

import dataclasses
import math
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh

from jaxlab.optimizers.placement import abstract_opt_state
from jaxlab.optimizers.settings import PARTS, check
from jaxlab.optimizers.trees import check_flags
from jaxlab.params import ParamSpec, abstract, axis_names, partition_spec, shardings

FLOAT32 = 4  # bytes
RANGES = {"accumulate": PARTS}


@dataclasses.dataclass(frozen=True)
class Costs:
    """The bytes that an optimizer stores, and that a training step exchanges.

    Attributes:
        parameters: all parameters; copies on several devices count once.
        state: the optimizer's state; copies on several devices count once.
        state_a_device: the part of the state that one device stores.
        gradients: gradients that a device exchanges in a step: its part of them, summed
            over the devices that have copies of its parameters. An embedding table that
            is also the head has a gradient for each of its two uses; both are summed,
            but count once here.
        statistics: taps that a device exchanges in a step, summed over all devices that
            have other tokens.
    """

    parameters: int
    state: int
    state_a_device: int
    gradients: int
    statistics: int

    @property
    def exchanged(self) -> int:
        """The bytes of gradients and statistics together."""
        return self.gradients + self.statistics


def state_bytes(optimizer: optax.GradientTransformation, specs: Any) -> int:
    """Return the bytes of an optimizer's state for the parameters `specs`.

    Computed from shapes alone; nothing is allocated. Copies on several devices count
    once.

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
    """Return the costs of an optimizer in `jaxlab.training.step.make_train_step`.

    For a weight [in, out] the statistics are in + out + 1 numbers at every step,
    whatever MKOR's period: linear in its sides, where K-FAC's are quadratic. On a mesh
    with the single axis "data" devices exchange nothing else but two or three numbers,
    the sums of the loss and of its weights. Where devices split parameters or time,
    they also exchange parameters and activations, and for an optimizer that multiplies
    matrices, parts of its matrices. That is up to the compiler and is not counted.

    Args:
        optimizer: any optax transformation.
        specs: tree of `ParamSpec`.
        mesh: a mesh from `make_mesh`, or an abstract one with its axes, which needs no
            devices.
        accumulate: number of parts of a batch; each part is exchanged separately.
        tapped: tree of booleans, the weights whose taps the optimizer needs, as
            `MKOR.tapped` returns them; None for an optimizer without statistics.

    Raises:
        TypeError: a leaf of `tapped` is no boolean.
        ValueError: `tapped` has other leaves than the parameters, or `accumulate` is
            no whole number above 0.
    """
    check(RANGES, accumulate=accumulate)
    if tapped is not None:
        check_flags(tapped, specs, "tapped")
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
    total = 0
    for x, sharding in zip(jax.tree.leaves(abstract(specs)), placed, strict=True):
        if _devices(mesh, _token_axes() - _names(sharding.spec)) > 1:  # has copies
            total += math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return total


def _tap_bytes(spec: ParamSpec, mesh) -> int:
    """The bytes of one weight's tap: a, g and rows."""
    if _devices(mesh, _token_axes()) == 1:
        return 0
    *stack, n_in, n_out = spec.shape
    parts_in, parts_out = (
        _devices(mesh, _names(partition_spec([axis])) - _token_axes())
        for axis in spec.axes[-2:]
    )
    return FLOAT32 * math.prod(stack) * (n_in // parts_in + n_out // parts_out + 1)


def _token_axes() -> set[str]:
    """The mesh axes along which devices have different tokens."""
    return _names(partition_spec(("batch", "time")))


def _names(entries) -> set[str]:
    """The mesh axes of a partition."""
    return {name for entry in entries for name in axis_names(entry)}


def _devices(mesh, names: set[str]) -> int:
    return math.prod(mesh.shape[name] for name in names)
