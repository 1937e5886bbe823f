"""Kernels over the devices of a mesh: batch rows and heads are divided among them.

A compiler that divides a program among devices cannot divide a kernel; `divided` does
it with `jax.shard_map`. It knows the axes of a mesh by their names.
"""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, PartitionSpec

MESH_AXES = {"B": ("data", "fsdp"), "H": ("tensor",)}
"""The axes of a mesh that divide the batch and the heads."""


def divided(kernel: Callable, inputs: Sequence[str], outputs: Sequence[str]):
    """The kernel on every device's part of its arguments, under the mesh in use.

    Without a mesh (`jax.set_mesh`), on one device, and inside `jax.shard_map` (which
    must be given ``check_vma=False``), it is the kernel itself. Sizes that a mesh axis
    does not divide stay whole.

    Args:
        inputs: the axes of each array argument, a letter each, B the batch and H the
          heads; arguments may be None.
        outputs: likewise of each result.
    """

    def run(*arrays):
        mesh, free = jax.sharding.get_abstract_mesh(), _free_axes()
        if all(size == 1 for size in free.values()):
            return kernel(*arrays)
        given = list(zip(arrays, inputs, strict=True))
        found = {letter: set() for letter in MESH_AXES}
        for array, axes in given:
            for letter, size in zip(axes, getattr(array, "shape", ()), strict=False):
                found.get(letter, set()).add(size)
        parts = {letter: _dividing(letter, sizes) for letter, sizes in found.items()}

        def spec(axes):
            return PartitionSpec(*(parts.get(letter) or None for letter in axes))

        if AxisType.Explicit in mesh.axis_types:
            arrays = [
                x if x is None else jax.sharding.reshard(x, spec(a)) for x, a in given
            ]
        return jax.shard_map(
            kernel,
            in_specs=tuple(None if x is None else spec(axes) for x, axes in given),
            out_specs=tuple(spec(axes) for axes in outputs),
            axis_names=set(free),
            check_vma=False,
        )(*arrays)

    return run


def part(letter: str, size: int) -> int:
    """A device's part of so many rows ("B") or heads ("H"), under the mesh in use."""
    free = _free_axes()
    for name in _dividing(letter, {size}):
        size //= free[name]
    return size


def divides(rows: int, heads: int) -> bool:
    """Whether a kernel of such sizes is surely divided among all devices of a program.

    So it is on one device, and under a mesh whose axes all divide rows or heads. Not
    where the program's devices are not known, and not inside `jax.shard_map`, where a
    kernel must be asked for.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    several = {name for name, size in mesh.shape.items() if size > 1}
    return several <= {*_dividing("B", {rows}), *_dividing("H", {heads})}


def _free_axes() -> dict[str, int]:
    """The sizes of the mesh axes that no `jax.shard_map` has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind != AxisType.Manual}


def _dividing(letter: str, sizes: set[int]) -> tuple[str, ...]:
    """Of a letter's mesh axes those that together divide all sizes."""
    free, chosen, parts = _free_axes(), [], 1
    for name in MESH_AXES[letter]:
        more = parts * free.get(name, 1)
        if name in free and all(size % more == 0 for size in sizes):
            chosen.append(name)
            parts = more
    return tuple(chosen)
