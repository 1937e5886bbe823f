"""Tables of the scores of trained models."""

from benchmarks.tables.form import experiment, measured, results, table


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
        accuracies = [accuracy(f"{group} {n} {beta}") for n in steps]
        rows.append([group, f"[0, {beta.removeprefix('beta=')}]", *accuracies])
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
    """A table of all cells: parameters, state, and the mean and range of each score."""
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
    """Bits per byte, in all and at the first and the last positions."""
    text = "Bits per byte of held-out Python source."
    return scores("lact", text, ".3f")
