"""What the tables are made of."""

import json

from benchmarks.record import RESULTS


def results(name: str) -> dict:
    """What a benchmark has recorded."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured(data: dict) -> str:
    """Where a benchmark was measured."""
    versions = ", ".join(f"{name} {x}" for name, x in data["versions"].items())
    commit = data["commit"][:9] + data["commit"][40:]  # and whether files differed
    return f"Measured on {data['cpus']} CPU cores ({versions}), commit {commit}."


def experiment(data: dict) -> str:
    """Where an experiment was measured, run by run."""
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
