"""The commands of docs/howto, as a user types them."""

import json
import pathlib
import runpy
import subprocess
import sys

import pytest

from jaxlab.data import CorpusConfig, GroupWordProblem, build, open_corpus
from jaxlab.training import TaskData, TextData

ROOT = pathlib.Path(__file__).parent.parent.parent
SMALL = (
    *("--model.width", "64", "--model.n-layers", "1", "--batch-size", "8"),
    *("--data.sequence-length", "16", "--data.eval-tokens", "256", "--steps", "3"),
    *("--optimizer.schedule.warmup", "1", "--sampling.max-tokens", "4"),
)


def run(*command, code=0):
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text"
    text.mkdir()
    for i in range(8):
        (text / f"{i}.py").write_text(f"def f{i}():\n    return {i}\n" * 20)
    said = run(
        *("scripts/train.py", "configs/tiny.py", *SMALL, "--directory", folder),
        *("--mesh.fsdp", "4", "--mesh.tensor", "2"),
        *("--data.corpus.directory", folder / "corpus"),
        *("--data.corpus.sources", text),
    )
    assert "Held-out" in said and "A sample after" in said
    return folder / "tiny"


def test_sample_continues_the_prompt(trained):
    said = run("scripts/sample.py", trained, "--prompt", "def f", "--max-tokens", "5")
    assert said.startswith("def f")


def test_evaluate_prints_scores(trained):
    scores = json.loads(run("scripts/evaluate.py", trained, "--tokens", "256"))
    assert scores["step"] == 3 and 0 < scores["bits_per_byte"] < 20
    assert scores["unigram_bits_per_byte"] > 0


EVALUATE = runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [
        *(("length", x, 1) for x in (0, -5)),
        *((name, 0, 1) for name in ("batch_size", "tokens", "rows")),
        ("step", -1, 0),
    ],
)
def test_an_option_of_evaluate_below_its_least(option, value, least):
    args = EVALUATE["Arguments"]("runs/nowhere", **{option: value})
    name = option.replace("_", "-")
    with pytest.raises(ValueError, match=f"--{name} {value} must be at least {least}."):
        EVALUATE["scores"](args)


def test_rows_longer_than_the_heldout_text(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text("a sentence, and another one. " * 9)
    corpus = CorpusConfig(
        directory=str(tmp_path / "corpus"), sources=(str(tmp_path / "*.txt"),)
    )
    build(corpus)
    tokens = open_corpus(corpus.directory).split("heldout").tokens
    asked = EVALUATE["Arguments"]("runs/x", length=tokens - 1)
    given = EVALUATE["text"](asked, TextData(corpus))
    assert given.sequence_length == tokens - 1 and given.eval_tokens is None
    for length in (tokens, 10**9):
        asked.length = length
        sentence = f"--length {length} does not .* {tokens} tokens; .* {tokens - 1}."
        with pytest.raises(ValueError, match=sentence):
            EVALUATE["text"](asked, TextData(corpus))


def test_rows_are_of_tasks_and_tokens_of_text():
    args = EVALUATE["Arguments"]
    with pytest.raises(ValueError, match="--rows is for a task, and runs/x was traine"):
        EVALUATE["text"](args("runs/x", rows=5), TextData())
    with pytest.raises(ValueError, match="--tokens is for text, and runs/x was train"):
        EVALUATE["task"](args("runs/x", tokens=5), TaskData())
    found = EVALUATE["task"](args("runs/x", length=9), TaskData())
    assert found == TaskData(GroupWordProblem(length=9), eval_rows=1024)


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (("scripts/train.py", "configs/tiny.py", "--model.widht", "8"), 2, "width"),
        (("scripts/train.py", "configs/tyny.py"), 2, "tiny.py"),
        (("scripts/train.py",), 2, "usage"),
        (("scripts/sample.py", "runs/nowhere"), 1, "runs/nowhere holds no run"),
        (("scripts/evaluate.py", "runs/nowhere"), 1, "runs/nowhere holds no run"),
    ],
)
def test_mistakes_get_a_sentence(command, code, message):
    said = run(*command, code=code)
    assert message in said and "Traceback" not in said


def test_sampling_from_a_missing_step_names_it(trained):
    said = run("scripts/sample.py", trained, "--step", "7", code=1)
    assert "7" in said and "Traceback" not in said
