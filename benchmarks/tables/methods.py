"""The table of methods, with a measured figure for each."""

import statistics
from typing import NamedTuple

from benchmarks.tables.form import results, table


class Method(NamedTuple):
    """A row: a method, its paper, its file, a measured figure, and its kernels."""

    name: str
    paper: str
    file: str
    measured: str
    kernels: str = ""


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

    def mixer(name):
        if name in ("lact", "mom"):  # folders
            return f"[`{name}`](jaxlab/mixers/{name})"
        return f"[`{name}.py`](jaxlab/mixers/{name}.py)"

    def copied(name):
        return f"{copying[name]['summary']['accuracy']['mean']:.1%} of tokens copied"

    def training(name):
        time = results("mixers")["mixers"][name]["train_milliseconds"][-1]
        return f"{time['median']:.0f} ms at T={length}, trained"

    chunked = "chunked XLA; TPU"
    delta = "chunked XLA; TPU; GPU"
    paged_file = "[`paged_attention`](pallas_kernels/paged_attention)"
    rows = [
        Method(
            "DeltaProduct",
            "2502.10297",
            mixer("delta_product"),
            f"{bits['DeltaProduct']}; S3 {s3['max']:.1%} right",
            delta,
        ),
        Method(
            "Gated DeltaNet",
            "2412.06464",
            mixer("delta_product"),
            copied("Gated DeltaNet"),
            delta,
        ),
        Method("DeltaNet", "2406.06484", mixer("delta_product"), "speed below", delta),
        Method(
            "Mixture-of-Memories",
            "2502.13685",
            mixer("mom"),
            f"{cost['ratio']['median']:.1f} times a Gated DeltaNet layer",
            delta,
        ),
        Method(
            "LaCT",
            "2505.23884",
            mixer("lact"),
            f"untrained, {written:.1%} of 256 pairs read back",
            "XLA",
        ),
        Method(
            "Gated Linear Attention", "2312.06635", mixer("gla"), copied("GLA"), chunked
        ),
        Method("RetNet", "2307.08621", mixer("retnet"), copied("RetNet"), chunked),
        Method("Mamba-2", "2405.21060", mixer("mamba2"), training("mamba2"), chunked),
        Method(
            "Mamba", "2312.00752", mixer("mamba"), copied("Mamba"), "chunked scan; TPU"
        ),
        Method("Aaren", "2405.13956", mixer("aaren"), training("aaren"), "XLA"),
        Method(
            "attention, sliding window",
            "1706.03762",
            mixer("attention"),
            bits["attention"],
            "XLA",
        ),
        Method(
            "paged attention",
            "2309.06180",
            paged_file,
            f"compiled for an H100: {paged['registers']} registers, no spills",
            "XLA; TPU; GPU (decoding)",
        ),
        Method(
            "EGGROLL",
            "2511.16652",
            "[`evolution`](jaxlab/evolution)",
            f"CartPole in {min(pole)} to {max(pole)} generations",
        ),
        Method(
            "GRPO",
            "2402.03300",
            "[`grpo.py`](jaxlab/rl/grpo.py)",
            f"sums it is asked from {before:.0%} to {after:.0%} right",
        ),
        Method(
            "MKOR",
            "2306.01685",
            optimizer("mkor"),
            f"autoencoder's loss {loss('MKOR, LAMB')} with LAMB, "
            f"{loss('LAMB')} without",
        ),
        Method(
            "SOAP",
            "2409.11321",
            optimizer("soap"),
            f"autoencoder's loss {loss('SOAP')}",
        ),
        Method(
            "Shampoo",
            "1802.09568",
            optimizer("shampoo"),
            f"autoencoder's loss {loss('Shampoo')}",
        ),
        Method(
            "FRUGAL",
            "2411.07837",
            optimizer("frugal"),
            f"autoencoder's loss {loss('FRUGAL')}, Adam's {loss('Adam')}",
        ),
        Method(
            "AdAdaGrad",
            "2402.11215",
            optimizer("adadagrad"),
            f"autoencoder's loss {loss('AdaGrad')} with a batch that stays",
        ),
    ]
    return table(
        ["method", "paper", "file", "kernels", "measured on CPU"],
        [[x.name, x.paper, x.file, x.kernels, x.measured] for x in rows],
    )
