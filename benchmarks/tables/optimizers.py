"""Tables of the losses and costs of optimizers."""

import statistics

from benchmarks.optimizers.compare import steps_to, target
from benchmarks.tables.form import measured, results, table

LANGUAGE_MODELS = {
    "attention": "optimizers_bytes_attention",
    "GLA": "optimizers_bytes_gla",
    "DeltaProduct": "optimizers_bytes_delta_product",
}


def autoencoder() -> str:
    data = results("optimizers_autoencoder")
    rows = [
        [
            name,
            _rate(method),
            f"**{_each(method, 'loss', '.1f')}**",
            f"{_milliseconds(data, name):.1f}",
        ]
        for name, method in data["methods"].items()
    ]
    header = ["optimizer", "rate", f"loss after {data['steps']} steps", "ms a step"]
    return table(header, rows) + "\n\n" + _measured(data)


def digits() -> str:
    data = results("optimizers_digits")
    rows = [
        [
            name,
            _rate(method),
            _each(method, "loss", ".4f"),
            f"**{_each(method, 'accuracy', '.1%')}**",
            f"{_milliseconds(data, name):.2f}",
        ]
        for name, method in data["methods"].items()
    ]
    loss = f"training loss after {data['steps']} steps"
    header = ["optimizer", "rate", loss, "held-out digits right", "ms a step"]
    return table(header, rows) + "\n\n" + _measured(data)


def bytes_by_mixer() -> str:
    """Held-out losses after the last step."""
    opened = [results(name) for name in LANGUAGE_MODELS.values()]
    rows = [
        [
            name,
            *(
                _middle([run["loss"] for run in _runs(data, name)], ".3f")
                for data in opened
            ),
            " ".join(f"{_milliseconds(data, name):.0f}" for data in opened),
        ]
        for name in opened[0]["methods"]
    ]
    header = ["optimizer", *LANGUAGE_MODELS, "ms a step"]
    return table(header, rows) + "\n\n" + _measured(*opened)


def steps_to_loss() -> str:
    """Steps of LAMB and Adam over its own, until it reaches their losses."""
    opened = [results(name) for name in LANGUAGE_MODELS.values()]
    compared = [(other, share) for other in ("LAMB", "Adam") for share in (0.5, 1.0)]
    rows = [
        [
            name,
            *(
                "" if name == other else _fewer(opened, name, other, share)
                for other, share in compared
            ),
        ]
        for name in opened[0]["methods"]
    ]
    whole = opened[0]["steps"]
    losses = [f"to {other}'s loss at {share * whole:.0f}" for other, share in compared]
    return table(["optimizer", *losses], rows)


def diagnosis() -> str:
    """The smallest eigenvalues of MKOR's factors along a run."""
    data = results("optimizers_diagnosis")
    names = {"autoencoder": "autoencoder", "bytes_attention": "bytes, attention"}
    rows = [
        [names[problem], *(f"{x['a']:.3f}  {x['b']:.3f}" for x in at_steps)]
        for problem, at_steps in data["problems"].items()
    ]
    steps = [f"after {x['step']} steps" for x in data["problems"]["autoencoder"]]
    return table(["smallest of A and of B", *steps], rows) + "\n\n" + measured(data)


def _fewer(opened: list[dict], name: str, other: str, share: float) -> str:
    """The steps of the other over those of the method by seed: median and range.

    A run that never reaches the loss counts as reaching it just after its last step.
    """
    ratios, never = [], 0
    for data in opened:
        loss = target(data, other, share)
        pairs = zip(
            steps_to(data, other, loss), steps_to(data, name, loss), strict=True
        )
        for theirs, ours in pairs:
            assert theirs is not None  # all of the other's runs reach that loss
            never += ours is None
            ratios.append(theirs / (ours or data["steps"] + data["every"]))
    shown = _middle(ratios, ".2f")
    return f"{shown}, {never} of {len(ratios)} never" if never else shown


def _middle(values: list[float], form: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def _runs(data: dict, name: str) -> list[dict]:
    return data["methods"][name]["runs"]


def _rate(method: dict) -> str:
    return "adaptive" if method["rate"] is None else f"{method['rate']:g}"


def _measured(*opened: dict) -> str:
    """The commits of the losses, and where the times were measured."""
    runs = {method["commit"] for data in opened for method in data["methods"].values()}
    commits = ", ".join(sorted(commit[:9] + commit[40:] for commit in runs))
    return f"Losses of commit {commits}. " + " ".join(
        sorted(set(map(measured, opened)))
    )


def _each(method: dict, figure: str, form: str) -> str:
    return "  ".join(f"{run[figure]:{form}}" for run in method["runs"])


def _milliseconds(data: dict, name: str) -> float:
    return data["clock"][name]["median"]


def step_time() -> str:
    """Milliseconds by width: steps, the optimizers' shares of them, and inverses."""
    data = results("optimizers_step_time")
    widths, contestants = data["widths"], data["contestants"]

    def row(name, x):
        times = [f"{each['median']:.3g}" for each in x["milliseconds"]]
        powers = (x["exponent"], x["exponent_of_larger"])
        return [name, *times, *("" if p is None else f"{p:.2f}" for p in powers)]

    rows = []
    for name, x in contestants.items():
        rows.append(row(name, x))
        if "optimizer" in x:
            rows.append(row(f"{name}, less SGD", x["optimizer"]))
    ratios = [
        f"{name} takes {', '.join(f'{each["median"]:.2g}' for each in x['ratio'])} "
        f"times as long as {x['beside']}"
        for name, x in contestants.items()
        if "ratio" in x
    ]
    half = widths[len(widths) // 2]
    header = ["ms a step", *(f"d={d}" for d in widths), "~ d^p, p =", f"from d={half}"]
    text = (
        f"{data['layers']} layers of d by d and {data['rows']} rows a step, in "
        f"{data['dtype']}; medians of {data['turns']} turns in one run. MKOR renews "
        "its factors at each step, and K-FAC its inverses where nothing else is said; "
        "factors and inverses alone are the time of renewing those of all layers. "
        "K-FAC has SGD beside it, because kfac-jax needs an older JAX."
    )
    by_width = f"By width, {'; '.join(ratios)}."
    return "\n\n".join((text, table(header, rows), by_width, measured(data)))


def overhead() -> str:
    """The time that MKOR adds to a language model's step, in percent."""
    data = results("optimizers_overhead")
    rows = []
    for name, x in data["contestants"].items():
        low, high = x["percent"]["quartiles"]
        more = f"**{x['percent']['median']:+.1f}%** ({low:+.1f} to {high:+.1f})"
        rows.append(
            [
                name,
                f"{x['milliseconds']['median']:.0f}",
                "" if name == x["beside"] else f"{more} to {x['beside']}",
                f"{x['state_bytes'] / 1e6:.1f}",
            ]
        )
    header = ["optimizer", "ms a step", "more time", "state, MB"]
    text = (
        f"The training step of `configs/{data['config']['name']}.py`, "
        f"{data['parameters'] / 1e6:.2f}M parameters: medians and quartiles of "
        f"{data['turns']} turns of {data['steps_a_turn']} steps each, in one run."
    )
    return f"{text}\n\n{table(header, rows)}\n\n{measured(data)}"


def costs() -> str:
    data = results("optimizer_costs")
    by_model = data["models"]
    names = next(iter(by_model.values()))
    rows = [
        [name, *(cell for costs in by_model.values() for cell in _cost(costs, name))]
        for name in names
    ]
    header = ["optimizer"]
    for model in by_model:
        header += [f"{model}: state, MB", "of a shard", "exchanged a step, MB"]
    sizes = " and ".join(
        f"{costs['AdamW']['parameters'] / 4e6:.1f}M ({model})"
        for model, costs in by_model.items()
    )
    text = (
        f"From shapes alone, for {sizes} parameters in float32. State: in all, over "
        f"AdamW's, and what a device has of it where {data['copies']} split the "
        "parameters (`fsdp`; factors are whole on each). Exchanged: what each of "
        f"{data['copies']} copies hands to sums over devices, gradients (of a tied "
        "table once) and statistics. K-FAC is a formula, for a step that renews its "
        "factors."
    )
    return f"{text}\n\n{table(header, rows)}"


def _cost(by_optimizer: dict, name: str) -> list[str]:
    costs, adamw = by_optimizer[name], by_optimizer["AdamW"]
    exchanged = _megabytes(costs["gradients"])
    if costs["statistics"]:
        exchanged += f" + {_megabytes(costs['statistics'])}"
    return [
        f"{_megabytes(costs['state'])} ({costs['state'] / adamw['state']:.2f})",
        _megabytes(costs["state_a_shard"]),
        exchanged,
    ]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g}" if count < 1e8 else f"{count / 1e6:,.0f}"
