"""Dividing the batch rows and heads of a kernel among the devices of a mesh.

A compiler that divides a program among devices cannot divide a kernel; `divided` does
it with `jax.shard_map`. It finds the axes of a mesh by their names.
"""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, PartitionSpec

MESH_AXES = {"B": ("data", "fsdp"), "H": ("tensor",)}
"""The mesh axes that divide the batch and the heads."""


def divided(kernel: Callable, inputs: Sequence[str], outputs: Sequence[str]):
    """Run the kernel on every device's part of its arguments, under the mesh in use.

    Without a mesh (`jax.set_mesh`), on one device, and inside `jax.shard_map` (which
    needs ``check_vma=False``), this is the kernel itself. Sizes that a mesh axis does
    not divide stay whole.

    Args:
        inputs: the axes of each array argument, one letter per axis, B for the batch
          and H for the heads; arguments may be None.
        outputs: the axes of each result.
    """

    def run(*arrays):
        mesh, free = jax.sharding.get_abstract_mesh(), _free_axes()
        if all(size == 1 for size in free.values()):
            return kernel(*arrays)
        arrays_and_axes = list(zip(arrays, inputs, strict=True))
        sizes = {letter: set() for letter in MESH_AXES}
        for array, axes in arrays_and_axes:
            for letter, size in zip(axes, getattr(array, "shape", ()), strict=False):
                sizes.get(letter, set()).add(size)
        names = {letter: _dividing(letter, sizes[letter]) for letter in MESH_AXES}

        def spec(axes):
            return PartitionSpec(*(names.get(letter) or None for letter in axes))

        if AxisType.Explicit in mesh.axis_types:
            arrays = [
                x if x is None else jax.sharding.reshard(x, spec(axes))
                for x, axes in arrays_and_axes
            ]
        return jax.shard_map(
            kernel,
            in_specs=tuple(
                None if x is None else spec(axes) for x, axes in arrays_and_axes
            ),
            out_specs=tuple(spec(axes) for axes in outputs),
            axis_names=set(free),
            check_vma=False,
        )(*arrays)

    return run


def part(letter: str, size: int) -> int:
    """A device's share of `size` rows ("B") or heads ("H"), under the mesh in use."""
    free = _free_axes()
    for name in _dividing(letter, {size}):
        size //= free[name]
    return size


def divides(rows: int, heads: int) -> bool:
    """Whether a kernel of these sizes is known to be divided among all devices in use.

    True on one device, and under a mesh whose axes all divide rows or heads. False
    where the program's devices are not known, and inside `jax.shard_map`, where a
    kernel must be named.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    axes = {name for name, size in mesh.shape.items() if size > 1}
    return axes <= {*_dividing("B", {rows}), *_dividing("H", {heads})}


def _free_axes() -> dict[str, int]:
    """The sizes of the mesh axes that no surrounding `jax.shard_map` divides."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind != AxisType.Manual}


def _dividing(letter: str, sizes: set[int]) -> tuple[str, ...]:
    """The mesh axes of a letter that together divide all sizes."""
    free, chosen, parts = _free_axes(), [], 1
    for name in MESH_AXES[letter]:
        with_name = parts * free.get(name, 1)
        if name in free and all(size % with_name == 0 for size in sizes):
            chosen.append(name)
            parts = with_name
    return tuple(chosen)
