"""A corpus of a single file: its rows or blocks are divided between the splits."""

import gzip
import hashlib
import json
import zipfile

import numpy as np
import pytest
from corpora import config, documents

import jaxlab.data.splitting
from jaxlab.data import build, heldout_batches, open_corpus
from jaxlab.data.splitting import assign_splits, block_borders


def drawn(length, alphabet="abcdefgh \n", seed=0):
    rng = np.random.default_rng(seed)
    return "".join(rng.choice(list(alphabet), length))


def build_one(tmp_path, text, name="a.txt", **kwargs):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return build(config(tmp_path, path, **kwargs))


def rejoined(corpus, text):
    """The blocks of both splits in the order in which the text has them."""
    splits = {split: documents(corpus, split) for split in ("train", "heldout")}
    blocks, position = [], 0
    while any(splits.values()):
        split = next(
            s for s in splits if splits[s] and text.startswith(splits[s][0], position)
        )
        blocks.append((split, splits[split].pop(0)))
        position += len(blocks[-1][1])
    assert "".join(block for _, block in blocks) == text
    return blocks


def held_out(name, number, fraction):
    digest = hashlib.sha256(f"{name}\0{number}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < fraction


def check_manifest(corpus, text_size, documents_in_all):
    """An entry a split, whose counts are those of what is there."""
    manifest = corpus.manifest
    assert sorted(f["split"] for f in manifest["files"]) == ["heldout", "train"]
    assert len({(f["name"], f["sha256"]) for f in manifest["files"]}) == 1
    for file in manifest["files"]:
        split = corpus.split(file["split"])
        texts = documents(corpus, file["split"])
        size = sum(len(text.encode()) for text in texts)
        totals = {"documents": len(texts), "bytes": size, "tokens": split.tokens}
        assert totals == {key: file[key] for key in totals}
        assert manifest["splits"][file["split"]] == totals | {"files": 1}
        assert split.tokens == size + 2 * len(texts)
        assert len(texts) > 0
    assert sum(f["bytes"] for f in manifest["files"]) == text_size
    assert sum(f["documents"] for f in manifest["files"]) == documents_in_all


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("name", ["a.txt", "b.md.gz", "c.json"])
def test_one_document_is_cut_into_blocks(tmp_path, name, fraction):
    text = drawn(300_000)
    data = json.dumps({"text": text}) if name == "c.json" else text
    if name == "b.md.gz":
        data = gzip.compress(text.encode())
    corpus = build_one(tmp_path, data, name, heldout_fraction=fraction)
    blocks = rejoined(corpus, text)
    check_manifest(corpus, len(text), len(blocks))
    assert 50 < len(blocks) <= 64
    assert all(block.endswith("\n") for _, block in blocks[:-1])
    assert all(len(text) // 64 <= len(block) < 6000 for _, block in blocks[:-1])
    expected = [held_out(name, number, fraction) for number in range(len(blocks))]
    if 0.01 < fraction < 0.99:
        assert [split == "heldout" for split, _ in blocks] == expected
    else:
        assert min(len(documents(corpus, split)) for split in ("train", "heldout")) == 1
    assert set(corpus.baselines) == {"unigram", "bigram"}


def test_a_single_file_is_divided_the_same_way_everywhere(tmp_path):
    text = drawn(50_000)
    one, two = tmp_path / "one", tmp_path / "two"
    for place in (one, two):
        place.mkdir()
    corpus = build_one(one, text)
    assert build_one(two, text).fingerprint == corpus.fingerprint
    assert build_one(one, text).manifest == corpus.manifest  # opens
    assert open_corpus(str(one / "corpus")).fingerprint == corpus.fingerprint
    batches = heldout_batches(corpus.split("heldout"), batch_size=2, sequence_length=64)
    scored = sum((batch["weights"] * batch["bytes"]).sum() for batch in batches)
    assert scored == corpus.split("heldout").bytes
    (one / "a.txt").write_text(text + "more")
    with pytest.raises(ValueError, match="1 were added, removed or changed"):
        build_one(one, text + "more")


def test_empty_files_do_not_count(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    (root / "empty.txt").write_text("")
    (root / "bad.txt").write_bytes(b"\xff")
    with zipfile.ZipFile(root / "a.zip", "w") as archive:
        archive.writestr("inner.txt", drawn(5000))
        archive.writestr("empty.txt", "")
    corpus = build(config(tmp_path, root))
    check_manifest(corpus, 5000, len(rejoined(corpus, drawn(5000))))
    assert {f["name"] for f in corpus.manifest["files"]} == {"a.zip/inner.txt"}


@pytest.mark.parametrize("alphabet", ["é", "日本語", "🙂é\r", "aé日🙂 "])
def test_text_without_line_ends_is_cut_between_characters(tmp_path, alphabet):
    text = drawn(7000, alphabet)
    corpus = build_one(tmp_path, text)
    if len(set(alphabet)) > 1:
        rejoined(corpus, text)
    pieces = documents(corpus, "train") + documents(corpus, "heldout")
    assert sorted("".join(pieces)) == sorted(text)
    assert "\ufffd" not in "".join(pieces)
    assert all(len(piece.encode()) >= 1021 for piece in pieces)


@pytest.mark.parametrize("size", [1, 2047, 2048, 2049, 5000])
def test_a_text_too_short_to_divide_is_trained_on(tmp_path, size):
    corpus = build_one(tmp_path, drawn(size))
    train, heldout = (corpus.split(split) for split in ("train", "heldout"))
    assert (len(heldout) > 0) == (size >= 2048)
    assert len(train) > 0
    assert train.bytes + heldout.bytes == size


def test_a_short_text_is_not_held_out_whole(tmp_path):
    corpus = build_one(tmp_path, "short", heldout_fraction=0.999)
    assert documents(corpus, "train") == ["short"]
    assert [file["split"] for file in corpus.manifest["files"]] == ["train"]


def check_borders(text, least, most):
    borders = block_borders(text)
    assert borders[0] == 0 and borders[-1] == len(text)
    size = min(max(len(text) // 64, least), most)
    lengths = np.diff(borders)
    if len(text) < 2 * size:
        assert len(lengths) == 1
        return
    assert len(lengths) > 1
    # Characters have up to 4 bytes, so a cut moves by up to 3.
    assert lengths.min() >= size - 3
    assert lengths[:-1].max() <= 2 * size and lengths[-1] < 2 * size
    for start, end in zip(borders, borders[1:], strict=False):
        text[start:end].decode()
        ends_its_line = end == len(text) or text[end - 1 : end] == b"\n"
        assert ends_its_line or b"\n" not in text[start + size - 1 : end]


def test_blocks_of_many_texts(monkeypatch):
    monkeypatch.setattr(jaxlab.data.splitting, "LEAST", 8)
    monkeypatch.setattr(jaxlab.data.splitting, "MOST", 32)
    rng = np.random.default_rng(0)
    for alphabet in ("a\n", "aaaaaaaaaaaaaaaaaaaaaaaaa\n", "é🙂\n", "日", "\n"):
        for length in [0, 1, 7, 8, 15, 16, 17, 24, 100, *rng.integers(1, 5000, 40)]:
            text = "".join(rng.choice(list(alphabet), length))
            check_borders(text.encode(), 8, 32)


def test_a_long_line_after_short_ones():
    text = b"short\n" * 300 + b"x" * 200_000 + b"\n" + b"short\n" * 3
    borders = block_borders(text)
    check_borders(text, 2**10, 2**20)
    assert text[borders[0] : borders[1]].endswith(b"\n") or borders[1] > 1800


def test_blocks_have_at_most_a_mebibyte():
    text = (b"x" * 99 + b"\n") * 700_000  # 70 MB
    lengths = np.diff(block_borders(text))
    assert 2**20 <= lengths.min() and lengths[:-1].max() < 2**20 + 100


ROWS = [f"row {i} " + "x" * (i % 7) for i in range(200)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_the_rows_of_one_file_are_divided(tmp_path, name):
    rows = [{"text": text} for text in ROWS]
    rows.insert(3, {"text": ""})  # has no number
    if name == "a.jsonl":
        data = "\n".join(map(json.dumps, rows)).encode()
    elif name == "a.json":
        data = json.dumps(rows).encode()
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        data = (tmp_path / name).read_bytes()
    corpus = build_one(tmp_path, data, name, heldout_fraction=0.2)
    expected = [held_out(name, number, 0.2) for number in range(len(ROWS))]
    assert 10 < sum(expected) < 80
    assert documents(corpus, "heldout") == [
        text for text, held in zip(ROWS, expected, strict=True) if held
    ]
    assert documents(corpus, "train") == [
        text for text, held in zip(ROWS, expected, strict=True) if not held
    ]
    check_manifest(corpus, sum(map(len, ROWS)), len(ROWS))
    assert all(file["skipped_rows"] == 1 for file in corpus.manifest["files"])


def test_rows_stay_where_they_are_as_others_follow(tmp_path):
    def held(count):
        place = tmp_path / str(count)
        place.mkdir()
        lines = "\n".join(json.dumps({"text": text}) for text in ROWS[:count])
        corpus = build_one(place, lines, "a.jsonl", heldout_fraction=0.2)
        return documents(corpus, "heldout")

    before, after = held(100), held(200)
    assert after[: len(before)] == before and len(after) > len(before)


def test_two_short_rows_are_enough(tmp_path):
    corpus = build_one(tmp_path, '{"text": "a"}\n{"text": "b"}', "a.jsonl")
    assert [len(corpus.split(split)) for split in ("train", "heldout")] == [1, 1]


def test_two_files_are_divided_by_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(drawn(5000))
    corpus = build(config(tmp_path, tmp_path / "*.txt"))
    assert documents(corpus, "train") == documents(corpus, "heldout") == [drawn(5000)]


def test_splits_of_names():
    names = [f"file {i}" for i in range(1000)]
    splits = assign_splits(names, 0.1)
    assert 70 < splits.count("heldout") < 130
    assert assign_splits(names[:500], 0.1) == splits[:500]
    for fraction in (1e-12, 0.5, 1 - 1e-12):
        assert set(assign_splits(names[:2], fraction)) == {"train", "heldout"}
        assert assign_splits(names[:1], fraction) == ["train"]
