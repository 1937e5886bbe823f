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
    s3 = results("state_tracking")["cells"]["S3 n=2 beta=2"]["summary"]["at 1x"]
    copying = results("selective_copying")["cells"]
    cost = results("mom")["cases"]["B=1, 4 heads of 64, forward and backward"]["mom"]
    written = next(
        row["mean"]
        for row in results("lact_recall")["written"]
        if (row["rule"], row["multiple"], row["pairs"]) == ("muon", 4, 256)
    )
    length = results("mixers")["lengths"][-1]
    compiled = results("gpu_kernels")["compiled"]
    paged = compiled["paged attention, 32 heads of 128, 8 of keys"]["paged_attention"]

    def file(name):
        return f"[`{name}.py`](jaxlab/mixers/{name}.py)"

    def copied(name):
        return f"{copying[name]['summary']['accuracy']['mean']:.1%} of tokens copied"

    def training(name):
        found = results("mixers")["mixers"][name]["train_milliseconds"][-1]
        return f"{found['median']:.0f} ms at T={length}, trained"

    chunked = "chunked XLA; TPU"
    delta = "chunked XLA; TPU; GPU"
    rows = [
        ("DeltaProduct", "2502.10297", file("delta_product"), delta),
        ("Gated DeltaNet", "2412.06464", file("delta_product"), delta),
        ("DeltaNet", "2406.06484", file("delta_product"), delta),
        ("Mixture-of-Memories", "2502.13685", file("mom"), delta),
        ("LaCT", "2505.23884", file("lact"), "XLA"),
        ("Gated Linear Attention", "2312.06635", file("gla"), chunked),
        ("RetNet", "2307.08621", file("retnet"), chunked),
        ("Mamba-2", "2405.21060", file("mamba2"), chunked),
        ("Mamba", "2312.00752", file("mamba"), "chunked scan; TPU"),
        ("Aaren", "2405.13956", file("aaren"), "XLA"),
        ("attention, sliding window", "1706.03762", file("attention"), "XLA"),
        (
            "paged attention",
            "2309.06180",
            "[`paged_attention`](pallas_kernels/paged_attention)",
            "XLA; TPU; GPU (decoding)",
        ),
    ]
    measures = [
        f"{bits['DeltaProduct']}; S3 {s3['max']:.1%} right",
        copied("Gated DeltaNet"),
        "speed below",
        f"{cost['ratio']['median']:.1f} times a Gated DeltaNet layer",
        f"untrained, {written:.1%} of 256 pairs read back",
        copied("GLA"),
        copied("RetNet"),
        training("mamba2"),
        copied("Mamba"),
        training("aaren"),
        bits["attention"],
        f"compiled for an H100: {paged['registers']} registers, no spills",
    ]
    return table(
        ["method", "paper", "file", "kernels", "measured on CPU"],
        [[*row, found] for row, found in zip(rows, measures, strict=True)],
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


def state_tracking() -> str:
    data = results("state_tracking")
    cells = data["cells"]
    parts = {label: label.split() for label in cells}  # group, n=1, beta=2
    steps = sorted({n for _, n, _ in parts.values()})

    def accuracy(label):
        if label not in cells:
            return "-"
        runs = [run["scores"] for run in cells[label]["runs"]]
        best = max(runs, key=lambda scores: scores["at 1x"])
        solved = sum(scores["at 1x"] >= 0.99 for scores in runs)
        return f"{best['at 1x']:.0%}, {best['at 4x']:.0%} ({solved} of {len(runs)})"

    rows = []
    for group, beta in dict.fromkeys((g, b) for g, _, b in parts.values()):
        found = [accuracy(f"{group} {n} {beta}") for n in steps]
        rows.append([group, f"[0, {beta.removeprefix('beta=')}]", *found])
    header = ["group", "beta", "1 step a token"] + [
        f"{n.removeprefix('n=')} steps" for n in steps[1:]
    ]
    trained = next(iter(cells.values()))["config"]["data"]["task"]["length"] - 1
    chance = {"parity": 1 / 2, "S3": 1 / 6, "S4": 1 / 24, "A5": 1 / 60, "S5": 1 / 120}
    groups = dict.fromkeys(group for group, _, _ in parts.values())
    guesses = ", ".join(f"{chance[g]:.1%} ({g})" for g in groups)
    text = (
        "Share of right answers at the last element of a word, one layer trained on "
        f"words of {trained}: the best seed at that length, the same at four times it, "
        "and how many seeds are above 99% at the trained length. Guessing gives "
        f"{guesses}."
    )
    return f"{text}\n\n{table(header, rows)}\n\n{experiment(data)}"


def scores(name: str, text: str, form: str = ".1%") -> str:
    """A row a cell: parameters, state, and the mean of every score over the seeds."""
    data = results(name)
    cells = data["cells"]
    summaries = {label: cell["summary"] for label, cell in cells.items()}
    single = [
        score
        for score, summary in next(iter(summaries.values())).items()
        if isinstance(summary, dict)
    ]

    def shown(summary):
        low, high = format(summary["min"], form), format(summary["max"], form)
        return f"{summary['mean']:{form}} ({low} to {high})"

    rows = [
        [
            label,
            f"{cell['parameters'] / 1e3:.0f}K",
            f"{cell['state_floats'] / 1e3:.1f}K",
        ]
        + [shown(cell["summary"][score]) for score in single]
        for label, cell in cells.items()
    ]
    seeds = max(len(cell["runs"]) for cell in cells.values())
    header = ["layer", "parameters", "state", *single]
    text = (
        f"{text} Mean of {seeds} seeds (least to largest); the state is the numbers "
        "that decoding keeps a sequence."
    )
    return f"{text}\n\n{table(header, rows)}\n\n{experiment(data)}"


def recall() -> str:
    return scores("recall", "Queries answered right, by the number of pairs in a row.")


def needle() -> str:
    text = "Tokens of the hidden value found, by the length of the row."
    return scores("needle", text)


def selective_copying() -> str:
    return scores("selective_copying", "Tokens, and whole rows, copied right.")


def induction() -> str:
    return scores("induction", "Rows answered right, by their length.")


def lact() -> str:
    """Bits per byte, also at the first and the last positions."""
    text = "Bits per byte of held-out Python source."
    return scores("lact", text, ".3f")


def mom() -> str:
    data = results("mom")
    rows = []
    for case, layers in data["cases"].items():
        ratio = layers["mom"]["ratio"]
        low, high = ratio["quartiles"]
        times = (f"{found['milliseconds']['median']:.0f}" for found in layers.values())
        rows.append([case, *times, f"{ratio['median']:.2f} ({low:.2f} to {high:.2f})"])
    header = ["case", "MoM ms", "Gated DeltaNet ms", "ratio"]
    text = (
        f"{data['memories']} memories, {data['memories_of_a_token']} a token with the "
        f"shared one, T={data['tokens']}, against one Gated DeltaNet layer of one "
        "memory's size. Medians and quartiles of ratios taken turn by turn."
    )
    return f"{text}\n\n{table(header, rows)}\n\n{measured(data)}"


def lact_recall() -> str:
    data = results("lact_recall")
    counts = sorted({row["pairs"] for row in data["written"]})
    kinds = dict.fromkeys((row["rule"], row["multiple"]) for row in data["written"])
    found = {
        (row["rule"], row["multiple"], row["pairs"]): row for row in data["written"]
    }

    def shown(row):
        return f"{row['mean']:.2f} ± {row['deviation']:.2f}"

    rows = [
        [f"{rule.replace('_', ' ')}, hidden size x{multiple}"]
        + [shown(found[rule, multiple, pairs]) for pairs in counts]
        for rule, multiple in kinds
    ]
    text = (
        "Untrained LaCT fast weights: share of random pairs that are read back after "
        f"one chunk wrote them, size {data['size']}, {data['seeds']} seeds."
    )
    header = ["update", *(f"{pairs} pairs" for pairs in counts)]
    return f"{text}\n\n{table(header, rows)}\n\n{measured(data)}"


def mixers() -> str:
    data = results("mixers")
    early, late = data["positions"]
    longest = data["lengths"][-1]
    rows = []

    def spread(measured):
        low, high = measured["quartiles"]
        return f"{measured['median']:.2f} ({low:.2f} to {high:.2f})"

    for name, found in data["mixers"].items():
        steps = [t["median"] for t in found["decode_milliseconds"]]
        rows.append(
            [
                name,
                f"{steps[0]:.3f}",
                f"{steps[1]:.3f}",
                spread(found["decode_ratio"]),
                f"{found['train_milliseconds'][-1]['median']:.0f}",
                spread(found["train_exponent"]),
                spread(found["above_feed_forward"]),
                f"{found['train_temporary_MB'][-1]:.0f}",
                f"{found['memory_exponent']:.2f}",
            ]
        )
    header = [
        *("mixer", f"ms a token at {early}", f"at {late}", "ratio"),
        *(f"training ms at {longest}", "~ T^p, p =", "p less a feed-forward layer's"),
        *(f"training MB at {longest}", "~ T^p, p ="),
    ]
    text = (
        f"One layer of width {data['width']}, one sequence, float32: decoding a token "
        "after so many, and forward and backward over a row. Medians (and quartiles of "
        "ratios and exponents taken turn by turn)."
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


def kernel_cycles() -> str:
    data = results("kernel_cycles")
    chips = list(next(iter(data["estimated"].values())))
    rows = []
    for variant, found in data["estimated"].items():
        cells = [found[chip][max(found[chip], key=int)] for chip in chips]
        rows.append(
            [variant]
            + [
                f"{c['cycles']:.2f} ({c['roofline'] / c['cycles']:.0%})"
                + ("" if c["heads"] == 16 else f", {c['heads']} heads")
                for c in cells
            ]
            + [f"{max(c['vmem'] for c in cells) / 2**20:.0f} MiB"]
        )
    text = (
        "Cycles a token and head, as the TPU compiler estimates them, and the share of "
        "the roofline; bfloat16, K = V = 128, 16 heads (fewer where said), 8192 tokens "
        "(1024 of several steps, of both directions of the delta rule and of the "
        "scan). A head of the selective scan is 128 channels "
        "of 16 states. Nothing ran on a TPU."
    )
    steps = [
        f"{variant} {max(found.values()):.3f}"
        for variant, found in data["steps"].items()
    ]
    channel = [
        f"{min(ratios):.2f} to {max(ratios):.2f} times {way}"
        for way in ("forward", "both ways")
        for ratios in [_channel_over_head(data["estimated"], chips, way)]
    ]
    return "\n\n".join(
        (
            text,
            table(["operation", *chips, "VMEM"], rows),
            f"A channel's decay costs a head's {' and '.join(channel)}.",
            "Bytes that a decode step of 16 heads moves on any of these chips, over "
            f"the state read and written once: {'; '.join(steps)}. libtpu "
            f"{data['versions']['libtpu']}.",
        )
    )


def _channel_over_head(estimated, chips, way):
    both = "" if way == "forward" else ", forward and backward"
    channel, head = (
        estimated[f"linear attention, a {of}'s decay{both}"]
        for of in ("channel", "head")
    )
    return [channel[c]["8192"]["cycles"] / head[c]["8192"]["cycles"] for c in chips]


def defaults() -> str:
    data = results("defaults")
    cycles = data["cycles"]
    cases = list(max(cycles.values(), key=len))

    def ratios(chips):
        known = [c for c in chips.values() if None not in c.values()]
        low, *_, high = sorted(c["pallas_tpu"] / c["xla"] for c in 2 * known)
        return (
            f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}-{high:.2f}"
        )

    rows = [
        [operation.replace("_", " ")]
        + [ratios(found[case]) if case in found else "-" for case in cases]
        for operation, found in cycles.items()
    ]
    return (
        "Estimated cycles of the program with the kernel, over those of plain JAX's on "
        "the same chip (v5e and v6e, where the estimate works); bfloat16 and heads of "
        "128 where nothing else is said, 8 heads, one row. XLA estimates plain JAX "
        "itself, without its copies. Nothing ran on a TPU.\n\n"
        + table(["operation", *cases], rows)
    )


def gpu_kernels() -> str:
    data = results("gpu_kernels")
    rows = [
        [variant, name.replace("_", " ")]
        + [f"{found[key]:,}" for key in ("registers", "spilled_bytes", "shared_bytes")]
        for variant, kernels in data["compiled"].items()
        for name, found in kernels.items()
    ]
    header = ["program", "kernel", "registers", "bytes spilled", "shared memory, bytes"]
    version = data["versions"]["nvidia-cuda-nvcc"]
    return (
        "The GPU kernels as compiled for an H100 (sm_90a), bfloat16, by the assembler "
        f"of CUDA {version}. Nothing ran on a GPU.\n\n{table(header, rows)}"
    )


TABLES = {
    "methods": methods,
    "language_model": language_model,
    "state_tracking": state_tracking,
    "recall": recall,
    "needle": needle,
    "lact": lact,
    "selective_copying": selective_copying,
    "induction": induction,
    "mom": mom,
    "lact_recall": lact_recall,
    "mixers": mixers,
    "delta_rule": delta_rule,
    "kernel_cycles": kernel_cycles,
    "defaults": defaults,
    "gpu_kernels": gpu_kernels,
}
"""By the name in the README's markers; a table without markers there is not shown."""


def filled(readme: str) -> str:
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if start not in readme:
            continue
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
