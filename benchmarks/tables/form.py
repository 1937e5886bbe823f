"""The building blocks of the tables."""

from benchmarks.record import results

__all__ = ["experiment", "measured", "results", "table"]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured(data: dict) -> str:
    """A sentence on where a benchmark was measured."""
    versions = ", ".join(f"{name} {x}" for name, x in data["versions"].items())
    commit = data["commit"][:9] + data["commit"][40:]  # the rest says "with changes"
    return f"Measured on {data['cpus']} CPU cores ({versions}), commit {commit}."


def experiment(data: dict) -> str:
    """A sentence on where the runs of an experiment were measured."""
    cells = data["cells"].values()
    commits = sorted({c[:9] + c[40:] for cell in cells for c in cell["commits"]})
    devices = sorted({device for cell in cells for device in cell["devices"]})
    cpus = sorted({str(n) for cell in cells for n in cell["cpus"]})
    versions = ", ".join(f"{name} {x}" for name, x in data["versions"].items())
    minutes = sum(run["seconds"] for cell in cells for run in cell["runs"]) / 60
    return (
        f"Measured on {', '.join(devices)} ({versions}), {' or '.join(cpus)} cores a "
        f"run, {minutes:.0f} minutes of training in all, commit {', '.join(commits)}."
    )
