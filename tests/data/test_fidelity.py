"""Tokenizers that do not give the text back are noticed while a corpus is built."""

import logging

import pytest
from corpora import byte_level, config

import jaxlab.data.fidelity
from jaxlab.data import build, load_tokenizer
from jaxlab.data.fidelity import RoundTrip, altered_bytes


def save(tmp_path, tokenizer):
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def characters(tmp_path, alphabet, normalizer=None):
    """A token for each of the characters; the others vanish."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {character: i for i, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    if normalizer:
        tokenizer.normalizer = normalizer(tokenizers.normalizers)
    return save(tmp_path, tokenizer)


def metaspace(tmp_path, scheme):
    """SentencePiece: spaces are part of words, and one is put before the first."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Metaspace(prepend_scheme=scheme),
            tokenizers.decoders.Fuse(),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat\n" * 20], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def build_with(tmp_path, tokenizer, *texts):
    root = tmp_path / "in"
    root.mkdir()
    for i, text in enumerate(texts):
        (root / f"{i}.txt").write_text(text)
    return build(config(tmp_path, root, tokenizer=tokenizer))


def test_letters_that_vanish(tmp_path, caplog):
    path = characters(tmp_path, "abcd \n")
    corpus = build_with(tmp_path, path, "abcx\n" * 100, "abcé\n" * 100)
    lost = (100 + 2 * 100) / (500 + 600)
    assert corpus.manifest["tokenizer"]["lossy"] == pytest.approx(lost)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == (
        "The tokenizer 'tokenizer.json' drops or changes 27.3% of the text, by a "
        "sample of 1100 bytes, so bits per byte of this corpus cannot be compared with "
        "those of others. A tokenizer with a token for every byte, or 'bytes', changes "
        "nothing"
    )


@pytest.mark.parametrize(
    "normalizer, text, altered",
    [
        (lambda n: n.Lowercase(), "aBcD" * 10, 20),
        (lambda n: n.StripAccents(), "ae", 0),
        (lambda n: n.Sequence([n.NFD(), n.StripAccents()]), "aé" * 10, 20),
        (lambda n: n.NFC(), "e\u0301" * 10, 30),
        (lambda n: n.Replace("a", ""), "abab", 2),
        (lambda n: n.Replace("a", "aa"), "ab" * 10, 10),
        (lambda n: n.Replace("a", "abcdefg"), "a", 1),
        (lambda n: n.Strip(), "a b\n", 1),
    ],
)
def test_normalizers(tmp_path, normalizer, text, altered):
    path = characters(tmp_path, "abcdefgé \n", normalizer)
    assert altered_bytes(load_tokenizer(path), text) == altered


def test_words_without_a_token(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"one": 0, "two": 1, "[UNK]": 2}, "[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = load_tokenizer(save(tmp_path, words))
    assert altered_bytes(tokenizer, "one two one") == 0
    assert altered_bytes(tokenizer, "one three two") >= len("three")
    assert altered_bytes(tokenizer, "one\ntwo") == 1
    words.model = tokenizers.models.WordLevel({"one": 0, "</s>": 1}, "[UNK]")
    tokenizer = load_tokenizer(save(tmp_path, words))
    with pytest.raises(ValueError, match="cannot encode the text that begins with 'tw"):
        tokenizer.encode("two one")


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("start", ["", " ", "   "])
def test_spaces_at_the_start_do_not_count(tmp_path, caplog, scheme, start):
    path = metaspace(tmp_path, scheme)
    text = f"{start}the cat sat, «naïve» 🙂\n  indented\t\n\n"
    corpus = build_with(tmp_path, path, text * 3, "the mat")
    assert "lossy" not in corpus.manifest["tokenizer"]
    assert caplog.records == []


def test_tokenizers_of_bytes_lose_nothing(tmp_path, caplog):
    path = byte_level(tmp_path / "tokenizer.json", "</s>")
    text = "naïve\r\n\t «日本» 🙂 </s> e\u0301\0"
    assert altered_bytes(load_tokenizer(path), text) == 0
    for tokenizer in (path, "bytes"):
        place = tmp_path / tokenizer.strip("/").replace("/", "-")
        place.mkdir()
        manifest = build_with(place, tokenizer, "naïve 🙂", "text").manifest
        assert set(manifest["tokenizer"]) == {
            *("name", "fingerprint", "vocab_size", "separator")
        }
    assert caplog.records == []


def test_the_sample_is_small_and_of_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr(jaxlab.data.fidelity, "SAMPLE", 4096)
    tokenizer = load_tokenizer(characters(tmp_path, "ab \n"))
    seen = []
    encode = tokenizer.encode
    monkeypatch.setattr(
        tokenizer, "encode", lambda text: seen.append(text) or encode(text)
    )
    sample = RoundTrip(tokenizer, 4)
    for file, letter in enumerate("abax"):
        for _ in range(50):
            sample.check(file, f"{letter}é bb\n".encode() * 100)
    # The share of each file ends with a word, though not with its last letter.
    assert sum(len(text.encode()) for text in seen) == sample.checked <= 4096
    assert sample.checked > 4000
    assert all(text.endswith((" ", "\n")) for text in seen)
    assert {text[0] for text in seen} == set("abx")
    assert sample.lossy == pytest.approx((2 * 3 / 7 + 3 / 7) / 4, rel=0.02)


def test_a_sample_of_a_text_without_spaces(tmp_path):
    tokenizer = load_tokenizer(characters(tmp_path, "ab"))
    sample = RoundTrip(tokenizer, 2**20)  # a KiB of each file
    assert sample.lossy == 0
    sample.check(0, "日本".encode() * 1000)
    assert sample.checked == sample.altered == 1023


def test_a_tokenizer_that_loses_everything(tmp_path, caplog):
    path = characters(tmp_path, "ab")
    corpus = build_with(tmp_path, path, "XYZ", "ZZZ")
    assert corpus.manifest["tokenizer"]["lossy"] == 1
    assert "changes 100% of the text" in caplog.text
