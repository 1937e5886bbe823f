"""What an optimizer's state reports reaches a run's metrics, and its events once."""

import json
import pathlib

import pytest

from jaxlab import params
from jaxlab.data import GroupWordProblem
from jaxlab.mixers import attention
from jaxlab.models import LMConfig
from jaxlab.optimizers import MKOR, SGD, Switch, WarmupStableDecay
from jaxlab.training import TaskData, TrainConfig, train

# Its rates do not depend on the number of steps, so that runs share their programs.
BASE = SGD(schedule=WarmupStableDecay(warmup=1, decay=0.0))
# A loss never falls so fast, so that it leaves after the fourth step.
SWITCH = Switch(least=1e9, patience=3, warmup=1)


def run(directory, optimizer, steps=7):
    return TrainConfig(
        name="test",
        directory=str(directory),
        data=TaskData(GroupWordProblem("parity", length=8), eval_rows=8),
        model=LMConfig(
            vocab_size=8, width=8, n_layers=1, pattern=(attention.Config(8, n_heads=2),)
        ),
        mesh=params.MeshConfig(data=1, fsdp=8),
        optimizer=optimizer,
        batch_size=8,
        steps=steps,
        log_every=3,
    )


def lines(directory):
    path = pathlib.Path(directory, "test", "metrics.jsonl")
    found = map(json.loads, path.read_text().splitlines())
    return [line for line in found if any(name.startswith("train/") for name in line)]


@pytest.mark.parametrize(
    ("optimizer", "skipped"), ((MKOR(base=BASE), 0), (BASE, None)), ids=("MKOR", "SGD")
)
def test_figures_are_in_every_line_of_who_has_them(tmp_path, optimizer, skipped):
    train(run(tmp_path, optimizer))
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [3, 6, 7]
    assert [line.get("train/skipped") for line in found] == [skipped] * 3
    assert not any("train/left_at" in line for line in found)


def test_an_event_is_told_once(tmp_path, capsys):
    """At its step, between two lines of metrics; not again after a resume."""
    cfg = run(tmp_path, MKOR(base=BASE, switch=SWITCH), steps=5)
    train(cfg)
    train(run(tmp_path, MKOR(base=BASE, switch=SWITCH)), resume=True)
    told = [line for line in lines(tmp_path) if "train/left_at" in line]
    assert [(line["step"], line["train/left_at"]) for line in told] == [(4, 4)]
    assert capsys.readouterr().out.count("step 4: the loss falls too slowly") == 1
    assert lines(tmp_path)[-1]["train/skipped"] == 0
