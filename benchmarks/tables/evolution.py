"""Tables of the results of evolution strategies and the cost of a population."""

import statistics

from benchmarks.tables.form import measured, results, table


def cartpole() -> str:
    data = results("cartpole")
    rows = []
    widths = data["generation"]
    for name in next(iter(widths.values())):
        runs = [data["generations"][width].get(name, []) for width in widths]
        rows.append(
            [
                name,
                *(", ".join(map(str, generations)) for generations in runs),
                *(_cost(times[name]) for times in widths.values()),
            ]
        )
    header = [
        "noise",
        *(f"layers of {width}: generations" for width in widths),
        *(f"layers of {width}: ms, over full" for width in widths),
    ]
    text = (
        f"Generations of {data['population']} members, seeds 1 to 5, until the mean "
        "parameters balance the pole for 500 steps in all "
        f"{data['evaluation_episodes']} episodes of an evaluation; and the time of one "
        "in which every member lives for 500 steps, with the quartiles of its ratio to "
        "that with full noise."
    )
    return "\n\n".join((text, table(header, rows), measured(data)))


def _cost(time: dict) -> str:
    low, high = time["ratio"]["quartiles"]
    middle = time["ratio"]["median"]
    return (
        f"{time['milliseconds']['median']:.0f}, {middle:.2f} ({low:.2f} to {high:.2f})"
    )


def population() -> str:
    data = results("population")
    rows = [
        [
            name,
            f"{case['milliseconds']['median']:.1f}",
            f"{case['share']['median']:.1%} ({case['share']['quartiles'][0]:.1%} to "
            f"{case['share']['quartiles'][1]:.1%})",
        ]
        for name, case in data["cases"].items()
        if name != "plain"
    ]
    text = (
        f"Throughput of {data['members']} members, a vector each through a matrix of "
        f"width {data['width']}, over that of plain inference with as many vectors "
        f"({data['cases']['plain']['milliseconds']['median']:.1f} ms)."
    )
    header = ["population", "ms", "share of plain inference"]
    return "\n\n".join((text, table(header, rows), measured(data)))


def integer_model() -> str:
    data = results("integer_model")
    rows = [
        _integer_row(population, runs)
        for population, runs in data["populations"].items()
    ]
    rows.append(
        _integer_row(f"{data['longer']['strategy']['population']}", [data["longer"]])
    )
    rows += [[n, "", "", "", f"{x:.2f}"] for n, x in data["baselines"].items()]
    header = [
        "population",
        "generations",
        "bytes read",
        "minutes",
        "held-out bits per byte",
    ]
    return table(header, rows) + "\n\n" + measured(data)


def _integer_row(population: str, runs: list[dict]) -> list[str]:
    first = runs[0]
    bits = " ".join(f"{run['bits_per_byte']:.2f}" for run in runs)
    minutes = statistics.mean(run["seconds"] for run in runs) / 60
    return [
        population,
        str(first["steps"]),
        f"{first['bytes_read'] / 1e6:.2f}M",
        f"{minutes:.1f}",
        f"**{bits}**",
    ]


def fine_tuning() -> str:
    data = results("fine_tuning")
    rows = []
    for method, result in data["methods"].items():
        runs = result["runs"]
        rows.append(
            [
                method,
                *(_last(runs, name) for name in ("right", "right_held_out")),
                f"{runs[0]['right'][-1][0] * data['answers_a_step'] / 1e6:.2f}M",
            ]
        )
    header = ["method", "right", "right, held out", "answers seen"]
    return table(header, rows) + "\n\n" + measured(data)


def _last(runs: list[dict], name: str) -> str:
    return ", ".join(f"{run[name][-1][1]:.0%}" for run in runs)
