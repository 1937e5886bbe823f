"""Imports go one way, between layers and between modules; files stay readable."""

import ast
import graphlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

MAY_IMPORT = {
    "config": set(),
    "checkpoint": {"config"},
    "params": set(),
    "layers": {"params"},
    "mixers": {"params", "layers"},
    "feedforward": {"params", "layers"},
    "models": {"params", "layers", "mixers", "feedforward"},
    "decoding": {"params", "layers", "models"},
    "objectives": {"params", "models", "evaluation"},
    "optimizers": {"params"},
    "evolution": {"params"},
    "environments": set(),
    "rl": {
        "params",
        "layers",
        "models",
        "decoding",
        "data",
        "objectives",
        "evolution",
    },
    "data": set(),
    "inference": {"params", "layers", "models", "decoding"},
    "evaluation": {"params", "layers", "mixers", "models", "data"},
    "training": {
        "params",
        "layers",
        "mixers",
        "feedforward",
        "models",
        "decoding",
        "optimizers",
        "data",
        "inference",
        "evaluation",
        "evolution",
        "objectives",
        "environments",
        "rl",
        "config",
        "checkpoint",
    },
}

LONGEST = 600  # lines of a file


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the full name"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def python_files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("layer", sorted(MAY_IMPORT))
def test_layer_imports_only_lower_layers(layer):
    allowed = MAY_IMPORT[layer] | {layer}
    for path in python_files(f"jaxlab/{layer}"):
        for name in imported(path):
            if name.startswith("jaxlab."):
                assert name.split(".")[1] in allowed, f"{path} imports {name}"


def test_every_layer_is_listed():
    found = {path.parent.name for path in (ROOT / "jaxlab").glob("*/__init__.py")}
    assert found == set(MAY_IMPORT)


def test_kernels_stand_on_jax_alone():
    allowed = {"jax", "jaxtyping", "numpy", "pallas_kernels"} | sys.stdlib_module_names
    for path in python_files("pallas_kernels"):
        for name in imported(path):
            assert name.split(".")[0] in allowed, f"{path} imports {name}"


def test_library_imports_no_scripts_and_no_torch():
    for folder in ("jaxlab", "pallas_kernels"):
        for path in python_files(folder):
            for name in imported(path):
                top = name.split(".")[0]
                assert top not in ("configs", "scripts", "benchmarks", "tests", "torch")


def modules():
    """The files of both packages by the names of their modules."""
    for folder in ("jaxlab", "pallas_kernels"):
        for path in python_files(folder):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), path


def test_no_module_imports_itself_through_others():
    """Wherever an import stands: in a function, or for the type checker alone, too.

    `from a import b` is an import of the module a.b where there is one, not of a. That
    Python runs a package's `__init__` before its modules is not counted.
    """
    files = dict(modules())
    imports = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imports[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                full = (f"{node.module}.{alias.name}" for alias in node.names)
                imports[name] |= {x if x in files else node.module for x in full}
        imports[name] = (imports[name] & files.keys()) - {name}
    # Raises CycleError, whose message has the modules of a circle.
    tuple(graphlib.TopologicalSorter(imports).static_order())


def test_no_file_is_too_long_to_read():
    for name, path in modules():
        lines = len(path.read_text().splitlines())
        assert lines <= LONGEST, f"{name} has {lines} lines; divide it."
