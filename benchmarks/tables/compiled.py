"""Tables of programs that XLA compiles for a CPU, with its fusions and without."""

import collections

from benchmarks.tables.form import results, table

RUNS = (
    "compiled_before",
    "compiled_jax_0.12.0.1",
    "compiled_more_jax_0.12.0.1",
    "compiled_jax_0.11.2",
    "compiled_more_jax_0.11.2",
)


def comparisons() -> str:
    """How many programs were compared, and how many were wrong."""
    rows = []
    for name in RUNS:
        data = results(name)
        largest = collections.defaultdict(float)
        for method, by_part in data["largest_difference"].items():
            kind = "mixers" if method.startswith("mixer ") else "operations"
            largest[kind] = max(largest[kind], *by_part.values())
        rows.append(
            [
                "before" if name == "compiled_before" else "now",
                data["versions"]["jaxlib"],
                ", ".join(map(str, data["heads"])),
                "; ".join(x.replace(" rows of ", ",") for x in data["shapes"]),
                ", ".join(data["parts"]),
                str(data["programs"]),
                str(sum(wrong["constant_operands"] > 0 for wrong in data["wrong"])),
                str(sum(_is_wrong(wrong) for wrong in data["wrong"])),
                f"{largest['operations']:.1g}, {largest['mixers']:.1g}",
            ]
        )
    header = [
        "library",
        "jaxlib",
        "heads",
        "rows,tokens",
        "parts",
        "programs",
        "with a product of the faulty kind",
        "wrong",
        "largest difference, operations and mixers",
    ]
    return table(header, rows)


def _is_wrong(comparison: dict) -> bool:
    """Whether the program was: one with a faulty product may be right by chance."""
    return not comparison.get("right", float(comparison["difference"]) <= 1e-4)


def wrong_before() -> str:
    """The operations, mixers and shapes that were wrong."""
    shapes: dict[str, list[str]] = {}
    for wrong in filter(_is_wrong, results("compiled_before")["wrong"]):
        seen = shapes.setdefault(wrong["method"], [])
        if wrong["shape"] not in seen:
            seen.append(wrong["shape"])
    rows = [[name, "; ".join(x)] for name, x in shapes.items()]
    return table(["operation or mixer, one head", "rows and tokens"], rows)
