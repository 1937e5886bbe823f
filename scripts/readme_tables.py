"""Write the README's tables from benchmarks/results: python scripts/readme_tables.py.

With --check nothing is written, and a README that disagrees is an error.
"""

import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent


def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured(data: dict) -> str:
    versions = ", ".join(f"{name} {x}" for name, x in data["versions"].items())
    commit = data["commit"][:9] + data["commit"][40:]  # and whether files differed
    return f"Measured on {data['cpus']} CPU cores ({versions}), commit {commit}."


def methods() -> str:
    runs = results("language_model")["runs"]
    bits = {
        name: f"{run['bits_per_byte']:.3f} bits per byte" for name, run in runs.items()
    }
    best = max(
        run["scores"][0]["accuracy_at_last"]
        for cell in results("state_tracking")["cells"]
        if (cell["n_householders"], cell["beta_max"]) == (2, 2.0)
        for run in cell["runs"]
    )
    delta = "[`delta_product.py`](jaxlab/mixers/delta_product.py)"
    attention = "[`attention.py`](jaxlab/mixers/attention.py)"
    return table(
        ["method", "paper", "file", "kernels", "measured on CPU"],
        [
            [
                *("DeltaProduct", "2502.10297", delta, "chunked XLA; Pallas not yet"),
                f"{bits['DeltaProduct']}; S3 {best:.1%} right",
            ],
            ["Gated DeltaNet", "2412.06464", delta, "the same", "speed below"],
            ["DeltaNet", "2406.06484", delta, "the same", "S3 below (one step)"],
            ["attention", "1706.03762", attention, "XLA", bits["attention"]],
        ],
    )


def language_model() -> str:
    data = results("language_model")
    rows = [
        [
            name,
            f"{run['parameters'] / 1e6:.2f}M",
            f"{run['minutes']:.1f}",
            f"{run['tokens'] / 1e6:.2f}M",
            f"**{run['bits_per_byte']:.3f}**",
        ]
        for name, run in data["runs"].items()
    ]
    rows += [[name, "", "", "", f"{x:.2f}"] for name, x in data["baselines"].items()]
    header = ["model", "parameters", "minutes", "tokens", "held-out bits per byte"]
    return table(header, rows) + "\n\n" + measured(data)


def state_tracking() -> str:
    data = results("state_tracking")
    cells = data["cells"]
    lengths = [s["length"] for s in cells[0]["runs"][0]["scores"]]

    def accuracy(cell, i):
        found = [run["scores"][i]["accuracy_at_last"] for run in cell["runs"]]
        return (
            f"{max(found):.1%} ({', '.join(f'{x:.1%}' for x in sorted(found)[::-1])})"
        )

    rows = [
        [str(c["n_householders"]), f"[0, {c['beta_max']:g}]"]
        + [accuracy(c, i) for i in range(len(lengths))]
        for c in cells
    ]
    trained = data["config"]["data"]["task"]["length"] - 1
    header = ["steps a token", "beta"] + [f"length {n}" for n in lengths]
    text = (
        "Share of right answers at the last element of a word in S3, one layer "
        f"trained on words of {trained}: best of {len(cells[0]['runs'])} seeds (all "
        "seeds). Guessing gives 16.7%."
    )
    return f"{text}\n\n{table(header, rows)}\n\n{measured(data)}"


def delta_rule() -> str:
    data = results("delta_rule")
    rows = []
    for case, contestants in data["cases"].items():
        shape = data["shapes"][case.split(",")[0]]
        sizes = " ".join(f"{axis}={size}" for axis, size in shape.items())

        def ratio(name, contestants=contestants):
            if name not in contestants:
                return "-"
            r = contestants[name]["ratio"]
            low, high = r["quartiles"]
            return f"{r['median']:.1f} ({low:.1f} to {high:.1f})"

        time = contestants["xla"]["milliseconds"]["median"]
        rows.append(
            [
                sizes,
                case.split(", ")[1],
                f"{time:.1f} ms",
                ratio("xla without refinement"),
                ratio("reference"),
                ratio("transformers"),
            ]
        )
    header = [
        "shape",
        "pass",
        "chunked",
        "without refinement / chunked",
        "recurrence / chunked",
        "torch_chunk_gated_delta_rule / chunked",
    ]
    text = "Medians and quartiles of ratios taken turn by turn in one run, float32."
    return f"{text}\n\n{table(header, rows)}\n\n{measured(data)}"


TABLES = {
    "methods": methods,
    "language_model": language_model,
    "state_tracking": state_tracking,
    "delta_rule": delta_rule,
}


def filled(readme: str) -> str:
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = readme.partition(start)
        _, _, after = rest.partition(end)
        readme = f"{before}{start}\n{make()}\n{end}{after}"
    return readme


def main() -> None:
    path = ROOT / "README.md"
    readme = path.read_text()
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    if "--check" not in sys.argv:
        path.write_text(filled(readme))
    elif filled(readme) != readme:
        sys.exit("README.md disagrees with benchmarks/results; run this script.")


if __name__ == "__main__":
    main()
