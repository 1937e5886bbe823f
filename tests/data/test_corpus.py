"""Corpora: how files are split, what is checked and what is refused."""

import dataclasses
import errno
import json
import math
import os
import pathlib
import pickle
import shutil
import socket
import subprocess
import sys
import sysconfig
from functools import partial

import numpy as np
import pytest
from corpora import byte_level, config, contents

import jaxlab.data.building
import jaxlab.data.ngrams
import jaxlab.data.storage
from jaxlab.data import (
    ByteTokenizer,
    CorpusConfig,
    build,
    ngram_bits_per_byte,
    open_corpus,
)


def test_every_file_is_one_document_of_one_split(tmp_path, texts):
    root, expected = texts
    corpus = build(config(tmp_path, root, heldout_fraction=0.2))
    assert contents(corpus) == sorted(expected.values())
    manifest = corpus.manifest
    assert {f["name"] for f in manifest["files"]} == set(expected)
    for split in ("train", "heldout"):
        documents = corpus.split(split)
        names = [f["name"] for f in manifest["files"] if f["split"] == split]
        size = sum(len(expected[name].encode()) for name in names)
        assert documents.bytes == size == manifest["splits"][split]["bytes"]
        assert documents.tokens == size + 2 * len(names)
        assert len(documents) == len(names) > 0
    assert corpus.vocab_size == 257


def test_an_opened_corpus_is_the_built_one(tmp_path, texts):
    built = build(config(tmp_path, texts[0]))
    opened = open_corpus(str(tmp_path / "corpus"))
    assert opened.manifest == built.manifest
    assert contents(opened) == contents(built)


def test_split_depends_on_the_name_alone(tmp_path, texts):
    root, expected = texts

    def splits(directory):
        corpus = build(
            CorpusConfig(
                directory=str(tmp_path / directory),
                sources=(str(root),),
                heldout_fraction=0.3,
            )
        )
        return {f["name"]: f["split"] for f in corpus.manifest["files"]}

    before = splits("one")
    (root / "new.txt").write_text("one more")
    for name in list(expected)[:10]:
        (root / name).write_text("rewritten")
    after = splits("two")
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_split_is_empty(tmp_path, texts, fraction):
    corpus = build(config(tmp_path, texts[0], heldout_fraction=fraction))
    counts = [len(corpus.split(split)) for split in ("train", "heldout")]
    assert sorted(counts) == [1, 39]


def test_more_than_one_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(jaxlab.data.storage, "SHARD", 64)
    monkeypatch.setattr(jaxlab.data.storage, "BLOCK", 16)
    root = tmp_path / "in"
    root.mkdir()
    rng = np.random.default_rng(1)
    expected = []
    for i, size in enumerate([1, 62, 64, 500, 3, 126, 30]):
        data = rng.integers(1, 128, size, dtype=np.uint8).tobytes()
        (root / f"{i}.txt").write_bytes(data)
        expected.append(data.decode())
    corpus = build(config(tmp_path, root))
    assert contents(corpus) == sorted(expected)
    documents = corpus.split("train")
    stream = documents.read([(0, documents.tokens)])[0]
    pieces = documents.read([(63, 65), (64, 64), (10, 200)])
    for piece, (a, b) in zip(pieces, [(63, 65), (64, 64), (10, 200)], strict=True):
        np.testing.assert_array_equal(piece, stream[a:b])
    shards = sorted((tmp_path / "corpus" / "train" / "tokens" / "c").iterdir())
    assert len(shards) == math.ceil(documents.tokens / 64)
    # Every shard has its checksum, and damage anywhere is found when it is read.
    for shard in shards:
        key = f"train/tokens/c/{shard.name}"
        whole = shard.read_bytes()
        assert key in corpus.manifest["checksums"]
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        start = 64 * int(shard.name)
        with pytest.raises(ValueError, match=f"{shard.name}' does not match its check"):
            corpus.split("train").read([(start, start + 1)])
        shard.unlink()  # TensorStore would read it as fill values
        with pytest.raises(ValueError, match=f"{shard.name}' is missing"):
            corpus.split("train").read([(start, start + 1)])
        shard.write_bytes(whole)
    assert contents(corpus) == sorted(expected)


def test_documents_are_random_access_and_picklable(tmp_path, texts):
    documents = build(config(tmp_path, texts[0])).split("train")
    last = documents[len(documents) - 1]
    np.testing.assert_array_equal(documents[-1], last)
    np.testing.assert_array_equal(documents[np.int64(len(documents) - 1)], last)
    assert len(list(documents)) == len(documents)
    copy = pickle.loads(pickle.dumps(documents))
    np.testing.assert_array_equal(copy[-1], last)
    with pytest.raises(IndexError, match=f"Document {len(documents)} of"):
        documents[len(documents)]
    with pytest.raises(TypeError, match="by its number"):
        documents["a"]
    with pytest.raises(ValueError, match="no split 'test'"):
        open_corpus(str(tmp_path / "corpus")).split("test")


def test_hugging_face_corpus_keeps_its_tokenizer(tmp_path, texts):
    path = byte_level(tmp_path / "tokenizer.json", "[STOP]")
    cfg = config(tmp_path, texts[0], tokenizer=path, separator="[STOP]")
    built = build(cfg)
    assert contents(built) == sorted(texts[1].values())
    assert contents(build(cfg)) == contents(built)
    os.remove(path)
    opened = open_corpus(str(tmp_path / "corpus"))
    assert contents(opened) == sorted(texts[1].values())
    with pytest.raises(ValueError, match="counted over bytes"):
        ngram_bits_per_byte(opened, 1)
    byte_level(tmp_path / "corpus" / "tokenizer.json", "[STOP]", "[MORE]")
    with pytest.raises(ValueError, match="not the tokenizer that the corpus"):
        contents(open_corpus(str(tmp_path / "corpus")))


# Building again -----------------------------------------------------------------------


def test_the_same_request_is_not_built_again(tmp_path, texts, monkeypatch):
    cfg = config(tmp_path, texts[0])
    built = build(cfg)
    for path in texts[0].rglob("*.txt"):
        os.utime(path, (1, 1))  # touched, as by a copy, but the same
    monkeypatch.setattr(jaxlab.data.building, "_write", None)  # would fail
    assert build(cfg).manifest == built.manifest


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heldout_fraction": 0.4}, "other heldout_fraction: 0.05 there, 0.4 asked"),
        ({"sources": ("{root}/a",)}, "other sources"),
        ({"tokenizer": "{tokenizer}"}, "other tokenizer"),
    ],
)
def test_another_request_is_refused(tmp_path, texts, change, message):
    build(config(tmp_path, texts[0]))
    names = {
        "root": texts[0],
        "tokenizer": byte_level(tmp_path / "t.json", "</s>"),
    }
    change = {
        key: value.format(**names)
        if isinstance(value, str)
        else tuple(v.format(**names) for v in value)
        if isinstance(value, tuple)
        else value
        for key, value in change.items()
    }
    cfg = CorpusConfig(
        **{"directory": str(tmp_path / "corpus"), "sources": (str(texts[0]),)} | change
    )
    with pytest.raises(ValueError, match=f"{message}.*rebuild=True"):
        build(cfg)
    assert build(cfg, rebuild=True).manifest["request"]["sources"] == [*cfg.sources]
    build(cfg)  # and now it is there


def test_the_text_key_is_part_of_a_request_unless_it_is_the_usual_one(tmp_path):
    rows = tmp_path / "in" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_text('{"text": "a", "body": "b"}\n{"text": "c", "body": "d"}\n')
    usual, other = (
        CorpusConfig(directory=str(tmp_path / key), sources=(str(rows),), text_key=key)
        for key in ("text", "body")
    )
    # Corpora built before there was the setting open with the usual value.
    assert set(build(usual).manifest["request"]) == {
        *("sources", "tokenizer", "separator", "heldout_fraction")
    }
    assert contents(build(usual)) == ["a", "c"]
    assert build(other).manifest["request"]["text_key"] == "body"
    assert contents(build(other)) == ["b", "d"]
    for cfg, asked in ((usual, "body"), (other, "text")):
        with pytest.raises(
            ValueError, match=f"text_key: '{cfg.text_key}' there, '{asked}' asked for"
        ):
            build(dataclasses.replace(cfg, text_key=asked))


def test_a_corpus_may_lie_among_its_sources(tmp_path, texts, caplog, monkeypatch):
    root, expected = texts
    (root / ".own.building-elsewhere-7").mkdir()  # another process is building it
    (root / ".own.building-elsewhere-7" / "zarr.json").write_text("{}")
    for source in (root, root / "**"):
        cfg = CorpusConfig(directory=str(root / "own"), sources=(str(source),))
        built = build(cfg)
        assert contents(built) == sorted(expected.values())
        assert all("own" not in path for path in built.manifest["inputs"])
        with monkeypatch.context() as patch:
            patch.setattr(jaxlab.data.building, "_survey", None)  # would fail
            build(cfg)
        assert contents(build(cfg, rebuild=True)) == sorted(expected.values())
        shutil.rmtree(root / "own")
    assert caplog.records == []


@pytest.mark.parametrize("change", ["add", "remove", "edit"])
def test_other_files_are_noticed(tmp_path, texts, change):
    root, expected = texts
    cfg = config(tmp_path, root)
    build(cfg)
    if change == "add":
        (root / "zz.txt").write_text("new")
    elif change == "remove":
        (root / "a" / "file2.txt").unlink()
    else:
        text = expected["a/file2.txt"]
        (root / "a" / "file2.txt").write_text("x" + text[1:])
    name = "zz.txt" if change == "add" else "a/file2.txt"
    with pytest.raises(ValueError, match=f"1 were added, removed.*'{name}' first"):
        build(cfg)
    texts_now = sorted(p.read_text() for p in root.rglob("*.txt"))
    assert contents(build(cfg, rebuild=True)) == texts_now
    assert [p.name for p in tmp_path.iterdir() if "building" in p.name] == []


def test_what_is_no_corpus_is_never_replaced(tmp_path, texts):
    target = tmp_path / "corpus"
    target.mkdir()
    build(config(tmp_path, texts[0]))  # an empty directory is fine
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    cfg = CorpusConfig(directory=str(other), sources=(str(texts[0]),))
    with pytest.raises(FileNotFoundError, match="holds no corpus"):
        build(cfg)
    with pytest.raises(ValueError, match="is not replaced"):
        build(cfg, rebuild=True)
    assert (other / "thesis.tex").read_text() == "years of work"


def test_damaged_manifests(tmp_path, texts):
    cfg = config(tmp_path, texts[0])
    build(cfg)
    path = tmp_path / "corpus" / "manifest.json"
    good = path.read_text()
    for bad in ("", "{}", "[]", good[:100]):
        path.write_text(bad)
        with pytest.raises(ValueError, match="not the manifest of a corpus"):
            open_corpus(cfg.directory)
    path.write_text(json.dumps(json.loads(good) | {"format": 99}))
    with pytest.raises(ValueError, match="corpus format 99"):
        open_corpus(cfg.directory)
    assert contents(build(cfg, rebuild=True)) == sorted(texts[1].values())


@pytest.mark.parametrize(
    "failure, raised, message",
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "filled up"),
        (ValueError("x: No space left on device [OS error 28]"), OSError, "filled up"),
        (KeyboardInterrupt("^C"), KeyboardInterrupt, "C"),
        (SystemExit("asked to stop"), SystemExit, "asked"),
        (RuntimeError("other"), RuntimeError, "other"),
    ],
)
def test_an_interrupted_build_leaves_nothing(
    tmp_path, texts, monkeypatch, failure, raised, message
):
    cfg = config(tmp_path, texts[0])
    flush = jaxlab.data.storage.ArrayWriter._flush
    calls = []

    def fail_later(self):
        calls.append(self)
        if len(calls) == 3:
            raise failure
        flush(self)

    monkeypatch.setattr(jaxlab.data.storage.ArrayWriter, "_flush", fail_later)
    with pytest.raises(raised, match=message) as caught:
        build(cfg)
    if raised is OSError:
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == cfg.directory
    assert [p.name for p in tmp_path.iterdir()] == ["texts"]


def kill_a_build(tmp_path, root):
    """Build in a process that dies before the corpus is whole."""
    code = f"""
import os
from jaxlab.data import CorpusConfig, build, storage
storage.ArrayWriter.close = lambda self: os._exit(9)
build(CorpusConfig(directory={str(tmp_path / "corpus")!r}, sources=({str(root)!r},)))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert any("building" in path.name for path in tmp_path.iterdir())


def test_a_killed_build_is_cleaned_up_by_the_next(tmp_path, texts):
    kill_a_build(tmp_path, texts[0])
    assert not (tmp_path / "corpus").exists()
    build(config(tmp_path, texts[0]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "texts"]


def test_a_killed_build_is_cleaned_up_where_the_corpus_is_only_opened(tmp_path, texts):
    build(config(tmp_path, texts[0]))

    def left_by(process, host):
        path = tmp_path / f".corpus.building-{host}-{process}"
        (path / "new").mkdir(parents=True)
        return path

    here = socket.gethostname()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    # In a container the next process often has the id of the last.
    gone = [left_by(ended.pid, here), left_by(os.getpid(), here)]
    kept = [left_by(os.getppid(), here), left_by(ended.pid, f"{here}-2")]
    built = build(config(tmp_path, texts[0]))
    assert contents(built) == sorted(texts[1].values())
    assert [path.exists() for path in (*gone, *kept)] == [False, False, True, True]


def test_two_processes_may_build_the_same_corpus(tmp_path, texts, monkeypatch):
    """The one that ends later takes what is there, if it is what it asked for."""
    cfg = config(tmp_path, texts[0])
    write = jaxlab.data.building._write

    def write_as_another_builds(*arguments, given=cfg):
        monkeypatch.setattr(jaxlab.data.building, "_write", write)
        with monkeypatch.context() as another:
            another.setattr(os, "getpid", os.getppid)
            build(given)
        return write(*arguments)

    monkeypatch.setattr(jaxlab.data.building, "_write", write_as_another_builds)
    built = build(cfg).fingerprint
    assert open_corpus(cfg.directory).fingerprint == built
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "texts"]

    shutil.rmtree(cfg.directory)
    other = dataclasses.replace(cfg, heldout_fraction=0.5)
    monkeypatch.setattr(
        jaxlab.data.building, "_write", partial(write_as_another_builds, given=other)
    )
    with pytest.raises(ValueError, match="heldout_fraction"):
        build(cfg)


# Refusals -----------------------------------------------------------------------------


def test_bad_configs():
    with pytest.raises(ValueError, match=r"sources=\('a\.txt',\)"):
        CorpusConfig(directory="x", sources="a.txt")
    for sources in (("",), ("a.txt", "")):
        with pytest.raises(ValueError, match=r"empty string.*'\.' for the working"):
            CorpusConfig(directory="x", sources=sources)
    with pytest.raises(ValueError, match="text_key='' names no key"):
        CorpusConfig(directory="x", text_key="")
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="not between 0 and 1"):
            CorpusConfig(directory="x", heldout_fraction=fraction)


# n-grams ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
def test_ngram_figure_by_counting_in_python(tmp_path, texts, order, monkeypatch):
    monkeypatch.setattr(jaxlab.data.ngrams, "TOKENS_AT_ONCE", 100)
    corpus = build(config(tmp_path, texts[0], heldout_fraction=0.2))

    def grams(split):
        for document in corpus.split(split):
            ids = document.tolist()
            for i in range(1, len(ids)):
                yield tuple(ids[i - order + 1 : i]), ids[i]

    counts, totals = {}, {}
    for context, token in grams("train"):
        counts[context, token] = counts.get((context, token), 0) + 1
        totals[context] = totals.get(context, 0) + 1
    bits = 0.0
    for context, token in grams("heldout"):
        seen = counts.get((context, token), 0) + 1
        bits -= math.log2(seen / (totals.get(context, 0) + 257))
    expected = bits / corpus.split("heldout").bytes
    assert ngram_bits_per_byte(corpus, order) == pytest.approx(expected, rel=1e-12)


def test_ngram_refusals(tmp_path, texts):
    corpus = build(config(tmp_path, texts[0] / "a" / "file10.txt"))
    assert len(corpus.split("heldout")) == 0
    with pytest.raises(ValueError, match="Nothing is held out"):
        ngram_bits_per_byte(corpus, 1)
    with pytest.raises(ValueError, match="order=3"):
        ngram_bits_per_byte(corpus, 3)


def test_default_corpus(tmp_path, caplog):
    corpus = build(CorpusConfig(directory=str(tmp_path / "corpus")))
    names = [f["name"] for f in corpus.manifest["files"]]
    assert "json/decoder.py" in names and len(names) > 500
    assert not any("site-packages" in name for name in names)
    assert not any("Left out" in record.message for record in caplog.records)
    train, heldout = corpus.split("train"), corpus.split("heldout")
    assert 0.02 < heldout.bytes / (train.bytes + heldout.bytes) < 0.10
    name = next(f["name"] for f in corpus.manifest["files"] if f["split"] == "train")
    source = pathlib.Path(sysconfig.get_paths()["stdlib"], name)
    assert ByteTokenizer().decode(train[0]) == source.read_bytes().decode()
    unigram, bigram = (ngram_bits_per_byte(corpus, n) for n in (1, 2))
    assert 4.3 < unigram < 4.8
    assert 3.2 < bigram < 3.7
