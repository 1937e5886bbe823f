"""The table of methods, with a measured figure each."""

import statistics

from benchmarks.tables.form import results, table


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

    pole = sum((x["rank 1"] for x in results("cartpole")["generations"].values()), [])
    tuned = results("fine_tuning")
    before = tuned["base_right"]
    runs = tuned["methods"]["GRPO"]["runs"]
    after = statistics.median(run["right"][-1][1] for run in runs)

    def loss(name):
        runs = results("optimizers_autoencoder")["methods"][name]["runs"]
        return f"{statistics.median(run['loss'] for run in runs):.1f}"

    def optimizer(name):
        return f"[`{name}.py`](jaxlab/optimizers/{name}.py)"

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
        ("EGGROLL", "2511.16652", "[`evolution`](jaxlab/evolution)", ""),
        ("GRPO", "2402.03300", "[`grpo.py`](jaxlab/rl/grpo.py)", ""),
        ("MKOR", "2306.01685", optimizer("mkor"), ""),
        ("SOAP", "2409.11321", optimizer("soap"), ""),
        ("Shampoo", "1802.09568", optimizer("shampoo"), ""),
        ("FRUGAL", "2411.07837", optimizer("frugal"), ""),
        ("AdAdaGrad", "2402.11215", optimizer("adadagrad"), ""),
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
        f"CartPole in {min(pole)} to {max(pole)} generations",
        f"sums it is asked from {before:.0%} to {after:.0%} right",
        f"autoencoder's loss {loss('MKOR, LAMB')} with LAMB, {loss('LAMB')} without",
        *(f"autoencoder's loss {loss(name)}" for name in ("SOAP", "Shampoo")),
        f"autoencoder's loss {loss('FRUGAL')}, Adam's {loss('Adam')}",
        f"autoencoder's loss {loss('AdaGrad')} with a batch that stays",
    ]
    return table(
        ["method", "paper", "file", "kernels", "measured on CPU"],
        [[*row, found] for row, found in zip(rows, measures, strict=True)],
    )
