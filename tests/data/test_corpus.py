"""Corpora: what is read, how it is split, what is checked, what is refused."""

import dataclasses
import errno
import gzip
import json
import logging
import math
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from functools import partial

import numpy as np
import pytest

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


@pytest.fixture
def texts(tmp_path):
    """A directory of 40 text files of differing lengths, and what they hold."""
    rng = np.random.default_rng(0)
    expected = {}
    for i in range(40):
        name = f"{'ab'[i % 2]}/file{i}.txt"
        expected[name] = "".join(rng.choice(list("abc é\n"), 1 + 7 * i))
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(expected[name])
    return tmp_path / "texts", expected


def config(tmp_path, *sources, **kwargs):
    return CorpusConfig(
        directory=str(tmp_path / "corpus"), sources=tuple(map(str, sources)), **kwargs
    )


def byte_level(path, *specials):
    """A tokenizer.json of one token a byte, and the special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    tokenizer.save(str(path))
    return str(path)


def contents(corpus):
    """All documents of both splits as text."""
    tokenizer = corpus.tokenizer
    found = []
    for split in ("train", "heldout"):
        documents = corpus.split(split)
        for i in range(len(documents)):
            ids = documents[i]
            assert ids.dtype == np.int32
            assert ids[0] == ids[-1] == tokenizer.separator
            assert tokenizer.separator not in ids[1:-1]
            found.append(tokenizer.decode(ids))
    return sorted(found)


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


def test_all_formats(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.md").write_text("markdown")
    (root / "b.py").write_text("print('é')")
    (root / "c.txt.gz").write_bytes(gzip.compress(b"compressed"))
    rows = [{"text": "row one", "id": 1}, {"text": ""}, {"text": "row\ntwo"}]
    lines = "\n\n".join(map(json.dumps, rows))
    (root / "d.jsonl").write_text(lines)
    (root / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "\\u00e9\\u0000"}'))
    table = pyarrow.table({"text": ["cell one", "cell two"], "other": [1, 2]})
    parquet.write_table(table, root / "f.parquet")
    with zipfile.ZipFile(root / "g.zip", "w") as archive:
        archive.writestr("inner/h.txt", "zipped")
        archive.writestr("inner/i.jsonl", '{"text": "zipped row"}')
        archive.writestr("inner/j.png", b"\x89PNG")
        archive.write(root / "f.parquet", "k.parquet")
    (root / "ignored.csv").write_text("no,text")
    (root / "empty.txt").write_text("")
    corpus = build(config(tmp_path, root))
    assert contents(corpus) == sorted(
        ["markdown", "print('é')", "compressed", "row one", "row\ntwo", "é\0"]
        + ["cell one", "cell two"] * 2
        + ["zipped", "zipped row"]
    )
    names = [f["name"] for f in corpus.manifest["files"]]
    assert "g.zip/inner/h.txt" in names and "empty.txt" not in names


def test_globs_and_named_files(tmp_path, texts):
    root, expected = texts
    corpus = build(config(tmp_path, root / "a" / "*1*.txt", root / "b" / "file3.txt"))
    # Names are relative to where the glob begins, and a named file is its own name.
    wanted = [n for n in expected if n.startswith("a/") and "1" in n]
    assert contents(corpus) == sorted(expected[n] for n in wanted + ["b/file3.txt"])
    deep = CorpusConfig(
        directory=str(tmp_path / "deep"), sources=(str(root / "**" / "*.txt"),)
    )
    assert contents(build(deep)) == sorted(expected.values())


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


def test_a_killed_build_is_cleaned_up_by_the_next(tmp_path, texts):
    code = f"""
import os
from jaxlab.data import CorpusConfig, build, storage
storage.ArrayWriter.close = lambda self: os._exit(9)
build(CorpusConfig(directory={str(tmp_path / "corpus")!r},
                   sources=({str(texts[0])!r},)))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert any("building" in p.name for p in tmp_path.iterdir())
    assert not (tmp_path / "corpus").exists()
    build(config(tmp_path, texts[0]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "texts"]


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


def refuse(tmp_path, error, message, *sources):
    with pytest.raises(error, match=message):
        build(config(tmp_path, *sources))
    assert not (tmp_path / "corpus").exists()


def test_missing_sources(tmp_path):
    refuse(tmp_path, FileNotFoundError, "no file or directory", tmp_path / "gone.txt")
    refuse(tmp_path, FileNotFoundError, "No file matches", tmp_path / "*.txt")
    (tmp_path / "data.csv").write_text("a,b")
    refuse(tmp_path, ValueError, "unknown extension '.csv'", tmp_path / "data.csv")
    refuse(tmp_path, ValueError, "None of the files", tmp_path / "*.csv")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path, ValueError, "None of the files", tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="holds no corpus"):
        open_corpus(str(tmp_path / "corpus"))


def test_empty_corpora(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n\n')
    refuse(tmp_path, ValueError, "corpus is empty: of 1 files", tmp_path / "a.txt")
    refuse(tmp_path, ValueError, "corpus is empty: of 2 files", tmp_path)


BAD_TEXT = [
    (b"abc\xff", r"byte 3 \(0xff\) is not valid UTF-8"),
    (b"caf\xe9 au lait", r"byte 3 \(0xe9\)"),
    (b"ab\0c", "byte 2 is NUL"),
]


@pytest.mark.parametrize("data, message", BAD_TEXT)
def test_files_that_are_not_text(tmp_path, texts, caplog, data, message):
    bad = texts[0] / "bad.txt"
    bad.write_bytes(data)
    refuse(tmp_path, ValueError, rf"bad\.txt' is not text: {message}", bad)
    with caplog.at_level(logging.WARNING):
        corpus = build(config(tmp_path, texts[0]))
    assert [r.message for r in caplog.records] == [
        "Skipped 1 files that are not text: bad.txt"
    ]
    assert [s["name"] for s in corpus.manifest["skipped"]] == ["bad.txt"]
    assert contents(corpus) == sorted(texts[1].values())


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"txt": "a"}', 'line 2 has no string under "text"'),
        ('{"text": 3}', 'line 2 has no string under "text"'),
        ('["text"]', 'line 2 has no string under "text"'),
        ('{"text": "a', "line 2 is not JSON"),
        ('{"text": "ab\\ud800"}', "line 2: character 2"),
    ],
)
def test_bad_rows(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    refuse(tmp_path, ValueError, message, path)


def test_bad_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    refuse(tmp_path, ValueError, r'no column "text" \(its columns: body\)', path)
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    refuse(tmp_path, ValueError, 'row 2: "text" is NoneType', path)
    path.write_bytes(b"PAR1 nonsense")
    refuse(tmp_path, ValueError, "not a whole parquet file", path)


def test_bad_archives(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(b"PK nonsense")
    refuse(tmp_path, ValueError, "not a whole zip archive", path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", "x")
    refuse(tmp_path, ValueError, "holds no file with an extension", path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "some text that is stored as it is")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"stored", b"STORED"))
    refuse(tmp_path, ValueError, r"member 'a\.txt', cannot be decompressed", path)
    path = tmp_path / "b.txt.gz"
    path.write_bytes(gzip.compress(b"text" * 100)[:-9])
    refuse(tmp_path, ValueError, "cannot be decompressed", path)
    path.write_bytes(b"not gzip")
    refuse(tmp_path, ValueError, "cannot be decompressed", path)


def test_bad_configs():
    with pytest.raises(ValueError, match=r"sources=\('a\.txt',\)"):
        CorpusConfig(directory="x", sources="a.txt")
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


def test_default_corpus(tmp_path):
    corpus = build(CorpusConfig(directory=str(tmp_path / "corpus")))
    names = [f["name"] for f in corpus.manifest["files"]]
    assert "json/decoder.py" in names and len(names) > 500
    assert not any("site-packages" in name for name in names)
    train, heldout = corpus.split("train"), corpus.split("heldout")
    assert 0.02 < heldout.bytes / (train.bytes + heldout.bytes) < 0.10
    name = next(f["name"] for f in corpus.manifest["files"] if f["split"] == "train")
    source = pathlib.Path(sysconfig.get_paths()["stdlib"], name)
    assert ByteTokenizer().decode(train[0]) == source.read_bytes().decode()
    unigram, bigram = (ngram_bits_per_byte(corpus, n) for n in (1, 2))
    assert 4.3 < unigram < 4.8
    assert 3.2 < bigram < 3.7


def test_a_file_that_two_sources_name_is_read_once(tmp_path):
    text = tmp_path / "text"
    (text / "sub").mkdir(parents=True)
    for i in range(5):
        (text / "sub" / f"{i}.md").write_text(f"text {i}")
    sources = (str(text), str(text / "sub" / "*.md"))
    corpus = build(CorpusConfig(directory=str(tmp_path / "corpus"), sources=sources))
    assert len(corpus.split("train")) + len(corpus.split("heldout")) == 5
