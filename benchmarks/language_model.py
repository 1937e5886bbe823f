"""Train the model of `make train`, and an attention model beside it as long.

    python -m benchmarks.language_model

Both have the same width, depth, heads, data and optimizer. The attention model makes
more steps, by default as many as take it about as long; the minutes of both are in
`results/language_model.json`.
"""

import dataclasses
import tempfile
import time

import tyro

from benchmarks.record import record
from jaxlab import models, params
from jaxlab.mixers import attention
from jaxlab.training import TextData, TrainConfig, config_file, train
from jaxlab.training.source import open_source


def run(cfg: TrainConfig) -> dict:
    assert isinstance(cfg.data, TextData)
    with tempfile.TemporaryDirectory() as directory:
        started = time.monotonic()
        found = train(dataclasses.replace(cfg, directory=directory))
        minutes = (time.monotonic() - started) / 60
    step = int(found.pop("step"))
    return {
        "config": config_file.to_json(cfg),
        "parameters": params.count(models.spec(cfg.model)),
        "minutes": minutes,
        "steps": step,
        "tokens": step * cfg.batch_size * cfg.data.sequence_length,
        **found,
    }


def main(attention_steps: int = 800, config: str = "configs/tiny.py") -> None:
    """Train both.

    Args:
        attention_steps: of the attention model.
        config: the run that both vary.
    """
    tiny = config_file.load(config)
    mixer = attention.Config(tiny.model.width, n_heads=tiny.model.pattern[0].n_heads)
    other = dataclasses.replace(
        tiny,
        name="attention",
        steps=attention_steps,
        model=dataclasses.replace(tiny.model, pattern=(mixer,)),
    )
    runs = {"DeltaProduct": run(tiny), "attention": run(other)}
    baselines = open_source(tiny.data, tiny.batch_size, tiny.seed).baselines
    path = record("language_model", runs=runs, baselines=baselines)
    print(f"Wrote {path}")


if __name__ == "__main__":
    tyro.cli(main)
