"""`docs/howto/own_method`: a method outside the library, by the library's scripts."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxlab import config, params

ROOT = pathlib.Path(__file__).parent.parent.parent
FOLDER = ROOT / "docs" / "howto" / "own_method"
FIT, TEXT = FOLDER / "smoothing.py", FOLDER / "smoothed_text.py"


def start(*command):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*command):
    process = start(*command)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


def test_its_mixer_obeys_the_laws():
    """Forward equals a scan of steps, whole or split; documents are apart."""
    model = config.load(TEXT).model
    (cfg,) = model.pattern
    mixer = sys.modules[type(cfg).__module__]
    weights = params.init(mixer.spec(cfg), jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, cfg.width))
    y, state = mixer.forward(weights, x, cfg, state=mixer.init_state(cfg, 2))
    one, stepped = mixer.init_state(cfg, 2), []
    for t in range(6):
        out, one = mixer.step(weights, x[:, t], cfg, one)
        stepped.append(out)
    np.testing.assert_allclose(np.stack(stepped, 1), y, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(one.average, state.average, rtol=1e-6)
    ids = np.repeat(np.int32([[0, 0, 1, 1, 1, -1]]), 2, 0)
    apart, _ = mixer.forward(weights, x, cfg, segment_ids=ids)
    alone, _ = mixer.forward(weights, x[:, 2:5], cfg)
    np.testing.assert_allclose(apart[:, 2:5], alone, rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_of_it_is_killed_resumed_and_scored(tmp_path):
    """To the bit, with MKOR, whose statistics come from the mixer and the leaf."""
    every = ("--log-every", "1", "--checkpoint-every", "20", "--eval-every", "200")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    said = run("scripts/train.py", FIT, "--directory", whole, *every)
    assert "Held-out loss" in said

    command = ("scripts/train.py", FIT, "--directory", killed, *every)
    child = start(*command)
    saved = killed / "smoothing" / "checkpoints" / "20" / "commit_success.txt"
    while not saved.exists() and child.poll() is None:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert "Held-out loss" in run(*command, "--resume")

    def losses(folder):
        lines = (folder / "smoothing" / "metrics.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in lines]
        return {x["step"]: x["train/loss"] for x in lines if "train/loss" in x}

    assert losses(killed) == losses(whole) and len(losses(whole)) == 200

    trained = whole / "smoothing"
    scores = json.loads(run("scripts/evaluate.py", trained, "--config", FIT))
    assert scores["step"] == 200 and scores["loss"] < 0.03
    assert 0 < scores["absolute_error"] < 0.2


@pytest.mark.slow
def test_a_language_model_of_its_mixer_is_trained_and_sampled(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(8):
        (text / f"{i}.py").write_text(f"def f{i}():\n    return {i}\n" * 20)
    run(
        *("scripts/train.py", TEXT, "--directory", tmp_path, "--steps", "3"),
        *("--data.sequence-length", "16", "--data.eval-tokens", "256"),
        *("--optimizer.schedule.warmup", "1"),
        *("--data.corpus.directory", tmp_path / "corpus"),
        *("--data.corpus.sources", text, "--sampling.max-tokens", "4"),
    )
    made = tmp_path / "smoothed_text"
    said = run(
        *("scripts/sample.py", made, "--config", TEXT),
        *("--prompt", "def f", "--max-tokens", "5"),
    )
    assert said.startswith("def f")


WRONG = """
import dataclasses
from jaxlab.params import ParamSpec
from jaxlab.training import TaskData, TrainConfig

@dataclasses.dataclass(frozen=True)
class Wrong:
    def spec(self):
        return {"w": ParamSpec((4, 2), (None, None))}

    def loss(self, params, batch, key):
        return params["w"].sum()

config = TrainConfig(data=TaskData(), objective=Wrong(), batch_size=8)
"""


def test_a_wrong_objective_gets_a_sentence(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    child = start("scripts/train.py", tmp_path / "wrong.py", "--directory", tmp_path)
    said, _ = child.communicate()
    assert child.returncode == 1 and "Traceback" not in said
    assert "error: Wrong.loss returned" in said and "(total, weight, figures)" in said


def test_what_is_said_without_its_file(tmp_path):
    data = config.to_json(config.load(FIT))
    for name in ("smoothing", "config_file_smoothing"):
        sys.modules.pop(name, None)
    with pytest.raises(ValueError, match="smoothing.*import its file first"):
        config.from_json(data)
