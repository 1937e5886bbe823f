"""Train the model of `make train`, and an attention model for about as long.

    python -m benchmarks.language_model

Both have the same width, depth, heads, data and optimizer. Writes the scores and
minutes of both to `results/language_model.json`.
"""

import dataclasses
import tempfile
import time

from benchmarks.record import record
from jaxlab import config, models, params
from jaxlab.training import TextData, TrainConfig, train
from jaxlab.training.source import open_source

CONFIGS = {
    "DeltaProduct": "configs/tiny.py",
    "attention": "configs/tiny_attention.py",
}


def run(cfg: TrainConfig) -> dict:
    assert isinstance(cfg.data, TextData)
    with tempfile.TemporaryDirectory() as directory:
        started = time.monotonic()
        scores = train(dataclasses.replace(cfg, directory=directory))
        minutes = (time.monotonic() - started) / 60
    step = int(scores.pop("step"))
    return {
        "config": config.to_json(cfg),
        "parameters": params.count(models.spec(cfg.model)),
        "minutes": minutes,
        "steps": step,
        "tokens": step * cfg.batch_size * cfg.data.sequence_length,
        **scores,
    }


def main() -> None:
    configs = {name: config.load(path) for name, path in CONFIGS.items()}
    runs = {name: run(cfg) for name, cfg in configs.items()}
    tiny = configs["DeltaProduct"]
    baselines = open_source(tiny.data, tiny.batch_size, tiny.seed).baselines
    path = record("language_model", runs=runs, baselines=baselines)
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
