"""Tables of the costs of layers and kernels, measured or estimated by compilers."""

from benchmarks.tables.form import measured, results, table


def mom() -> str:
    data = results("mom")
    rows = []
    for case, layers in data["cases"].items():
        ratio = layers["mom"]["ratio"]
        low, high = ratio["quartiles"]
        times = (f"{layer['milliseconds']['median']:.0f}" for layer in layers.values())
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
    written = {
        (row["rule"], row["multiple"], row["pairs"]): row for row in data["written"]
    }

    def shown(row):
        return f"{row['mean']:.2f} ± {row['deviation']:.2f}"

    rows = [
        [f"{rule.replace('_', ' ')}, hidden size x{multiple}"]
        + [shown(written[rule, multiple, pairs]) for pairs in counts]
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

    for name, costs in data["mixers"].items():
        steps = [t["median"] for t in costs["decode_milliseconds"]]
        rows.append(
            [
                name,
                f"{steps[0]:.3f}",
                f"{steps[1]:.3f}",
                spread(costs["decode_ratio"]),
                f"{costs['train_milliseconds'][-1]['median']:.0f}",
                spread(costs["train_exponent"]),
                spread(costs["above_feed_forward"]),
                f"{costs['train_temporary_MB'][-1]:.0f}",
                f"{costs['memory_exponent']:.2f}",
            ]
        )
    header = [
        "mixer",
        f"ms a token at {early}",
        f"at {late}",
        "ratio",
        f"training ms at {longest}",
        "~ T^p, p =",
        "p less a feed-forward layer's",
        f"training MB at {longest}",
        "~ T^p, p =",
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
    for variant, by_chip in data["estimated"].items():
        cells = [by_chip[chip][max(by_chip[chip], key=int)] for chip in chips]
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
        f"{variant} {max(ratios.values()):.3f}"
        for variant, ratios in data["steps"].items()
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
        + [ratios(by_case[case]) if case in by_case else "-" for case in cases]
        for operation, by_case in cycles.items()
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
        + [f"{kernel[key]:,}" for key in ("registers", "spilled_bytes", "shared_bytes")]
        for variant, kernels in data["compiled"].items()
        for name, kernel in kernels.items()
    ]
    header = ["program", "kernel", "registers", "bytes spilled", "shared memory, bytes"]
    version = data["versions"]["nvidia-cuda-nvcc"]
    return (
        "The GPU kernels as compiled for an H100 (sm_90a), bfloat16, by the assembler "
        f"of CUDA {version}. Nothing ran on a GPU.\n\n{table(header, rows)}"
    )
