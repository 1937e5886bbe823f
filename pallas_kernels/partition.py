"""Kernels over the devices of a mesh: batch rows and heads are divided among them.

A compiler that divides a program among devices cannot divide a kernel; `divided` does
it with `jax.shard_map`. It knows the axes of a mesh by their names.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import AxisType, PartitionSpec

MESH_AXES = {"B": ("data", "fsdp"), "H": ("tensor",)}
"""The axes of a mesh that divide the batch and the heads."""


def divided(kernel: Callable, inputs: Sequence[str], outputs: Sequence[str]):
    """The kernel on every device's part of its arguments, under the mesh in use.

    Without a mesh (`jax.set_mesh`), on one device, and inside `jax.shard_map`, it is
    the kernel itself. Sizes that a mesh axis does not divide stay whole.

    Args:
        inputs: the axes of each array argument, a letter each, B the batch and H the
          heads; arguments may be None.
        outputs: likewise of each result.
    """

    def run(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        free = {a for a, kind in kinds.items() if kind != AxisType.Manual}
        sizes = {a: mesh.shape[a] for a in free}
        if all(size == 1 for size in sizes.values()):
            return kernel(*arrays)
        found = {letter: set() for letter in MESH_AXES}
        for array, axes in zip(arrays, inputs, strict=True):
            for letter, size in zip(axes, getattr(array, "shape", ()), strict=False):
                found.get(letter, set()).add(size)
        parts = {
            letter: _dividing(names, sizes, found[letter])
            for letter, names in MESH_AXES.items()
        }

        def spec(axes):
            return PartitionSpec(*(parts.get(letter) for letter in axes))

        given = zip(arrays, inputs, strict=True)
        in_specs = tuple(None if x is None else spec(axes) for x, axes in given)
        return jax.shard_map(
            kernel,
            in_specs=in_specs,
            out_specs=tuple(spec(axes) for axes in outputs),
            axis_names=free,
            check_vma=False,
        )(*arrays)

    return run


def _dividing(
    names: Sequence[str], mesh_sizes: Mapping[str, int], sizes: set[int]
) -> tuple[str, ...] | None:
    """Of the named mesh axes those that together divide all sizes."""
    chosen, parts = [], 1
    for name in names:
        more = parts * mesh_sizes.get(name, 1)
        if name in mesh_sizes and all(size % more == 0 for size in sizes):
            chosen.append(name)
            parts = more
    return tuple(chosen) or None
