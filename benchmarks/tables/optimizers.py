"""What optimizers reach on one problem."""

import statistics

from benchmarks.tables.form import measured, results, table


def autoencoder() -> str:
    data = results("optimizers_autoencoder")
    rows = [
        [
            name,
            f"{found['rate']:g} of {', '.join(found['tried'])}",
            f"**{'  '.join(f'{run["loss"]:.1f}' for run in found['runs'])}**",
            f"{_step(found):.1f}",
        ]
        for name, found in data["methods"].items()
    ]
    header = ["optimizer", "rate", f"loss after {data['steps']} steps", "ms a step"]
    return table(header, rows) + "\n\n" + measured(data)


def _step(found: dict) -> float:
    return statistics.median(run["milliseconds_a_step"] for run in found["runs"])
