"""A run is found, and finds its data and tokenizer, from wherever it is looked at."""

import dataclasses
import shutil

import numpy as np
import pytest

from jaxlab.data import CorpusConfig, load_tokenizer
from jaxlab.inference import SamplingParams
from jaxlab.mixers import retnet
from jaxlab.models import LMConfig
from jaxlab.optimizers import AdamW, WarmupStableDecay
from jaxlab.training import (
    SearchConfig,
    TextData,
    TrainConfig,
    load_run,
    load_run_tokenizer,
    places,
    train,
)
from jaxlab.training.problems.fine_tuning import FineTuning

CORPUS = CorpusConfig(directory="data/words", sources=("texts",))
CFG = TrainConfig(
    name="base",
    data=TextData(CORPUS, sequence_length=8, eval_tokens=64),
    model=LMConfig(
        width=8,
        n_layers=1,
        mlp_hidden=8,
        pattern=(retnet.Config(8, n_heads=2),),
    ),
    optimizer=AdamW(schedule=WarmupStableDecay(warmup=1, decay=0.0)),
    batch_size=8,
    steps=2,
    sampling=SamplingParams(max_tokens=2),
)


def letters(path):
    """A tokenizer.json with a token for each of some letters."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {letter: i for i, letter in enumerate([*"abcdef \n", "[END]"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory with texts, a tokenizer and a run of relative paths."""
    home = tmp_path / "home"
    (home / "texts").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(8):
        text = "".join(rng.choice([*"abcdef \n"], 200))
        (home / "texts" / f"{i}.txt").write_text(text)
    letters(home / "letters.json")
    monkeypatch.chdir(home)
    return home


def with_letters(cfg):
    corpus = dataclasses.replace(CORPUS, tokenizer="letters.json", separator="[END]")
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, corpus=corpus))


def test_a_run_is_used_from_elsewhere_and_moved(home, tmp_path, monkeypatch, capsys):
    train(with_letters(CFG))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    corpus = load_run(home / "runs" / "base").config.data.corpus
    assert corpus.directory == str(home / "data" / "words")

    # Continued by another working directory's command, with its own tokenizer.
    longer = dataclasses.replace(with_letters(CFG), directory=str(home / "runs"))
    capsys.readouterr()
    result = train(dataclasses.replace(longer, steps=3), resume=True)
    said = capsys.readouterr().out
    assert result["step"] == 3 and "other settings: steps: 2 before, 3 now." in said

    # And by the first one's again, to which nothing has changed.
    monkeypatch.chdir(home)
    train(dataclasses.replace(with_letters(CFG), steps=4), resume=True)
    assert "steps: 3 before, 4 now." in capsys.readouterr().out

    monkeypatch.chdir(elsewhere)
    moved = home.rename(tmp_path / "moved")
    run = load_run(moved / "runs" / "base")
    assert run.config.data.corpus.directory == str(moved / "data" / "words")
    shutil.rmtree(moved / "data")
    tokenizer = load_run_tokenizer(moved / "runs" / "base", run.config)
    wanted = load_tokenizer(str(moved / "letters.json"), "[END]")
    assert tokenizer.fingerprint == wanted.fingerprint
    assert tokenizer.separator == wanted.separator


def test_a_directory_that_does_not_lead_to_the_data(home, tmp_path, monkeypatch):
    """The run is kept elsewhere; where relative paths began is saved with it."""
    cfg = dataclasses.replace(CFG, directory=str(tmp_path / "runs"))
    train(cfg)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "base"
    corpus = load_run(run).config.data.corpus
    assert corpus.directory == str(home / "data" / "words")
    assert train(dataclasses.replace(cfg, steps=3), resume=True)["step"] == 3

    tuning = SearchConfig(task=FineTuning(init_from="runs/base"))
    monkeypatch.chdir(home)
    full = places.resolved(tuning, [tmp_path])
    assert full.task.init_from == "runs/base" and full.model == CFG.model
    assert full.data.corpus.directory == "data/words"


def test_what_is_nowhere_keeps_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    roots = places.roots("runs/base", CFG)
    assert roots == [tmp_path, tmp_path]
    assert places.find("data/words", roots) == "data/words"
    gone = tmp_path / "gone"  # as on another machine
    assert places.find(str(tmp_path), [gone]) == str(tmp_path)
    assert places.find("data/words", [gone]) == "data/words"
    assert places.located(CFG, roots) == CFG
