"""Tokenizers: round trips, separators, bytes a token, errors."""

import pickle
import sys

import numpy as np
import pytest

from jaxlab.data import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    continuation,
    load_tokenizer,
)

TEXTS = ["", "plain", "naïve café\n", "日本語 🙂\t<|endoftext|>", "a\r\nb  c" * 50]


def train(path, specials, *, byte_level=True):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    if byte_level:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
            prepend_scheme="never"
        )
        tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="never")
        alphabet = [chr(i) for i in range(32, 127)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["the cat sat on the mat " * 20] * 3, trainer)
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_utf8(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    np.testing.assert_array_equal(tokenizer.encode(text.encode()), ids)
    assert tokenizer.vocab_size == 257 and tokenizer.separator == 256


def test_bytes_decoding_drops_separators_and_replaces_bad_utf8():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([256, 104, 105, 256]) == "hi"
    assert tokenizer.decode([104, 0xFF, 105]) == "h�i"
    assert tokenizer.decode([]) == ""


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.256.*span 3\.\.257"):
        ByteTokenizer().decode([3, 257])
    with pytest.raises(ValueError, match="integers"):
        ByteTokenizer().decode([0.5])


@pytest.mark.parametrize("text", TEXTS)
def test_hugging_face_round_trip_and_bytes(tmp_path, text):
    path = train(tmp_path / "tokenizer.json", ["<|endoftext|>"])
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    # The text of a separator is text, not a separator.
    assert tokenizer.separator not in ids
    # Independent count: the bytes of the tokens are the bytes of the text.
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    bordered = [tokenizer.separator, *ids, tokenizer.separator]
    assert tokenizer.decode(bordered) == text
    assert tokenizer.token_bytes[tokenizer.separator] == 0


def test_hugging_face_compresses_and_is_picklable(tmp_path):
    path = train(tmp_path / "tokenizer.json", ["</s>"])
    tokenizer = HuggingFaceTokenizer(path)
    ids = tokenizer.encode("the cat sat on the mat")
    assert len(ids) < len("the cat sat on the mat") / 2
    assert max(ids) < tokenizer.vocab_size == len(tokenizer.token_bytes)
    copy = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(copy.encode("the cat"), tokenizer.encode("the cat"))


def test_metaspace_counts_a_space_as_one_byte(tmp_path):
    path = train(tmp_path / "tokenizer.json", ["<eos>"], byte_level=False)
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("the cat sat")
    assert tokenizer.token_bytes[ids].sum() == len("the cat sat")


def test_separator_is_found_set_or_asked_for(tmp_path):
    path = train(tmp_path / "tokenizer.json", ["[STOP]"])
    with pytest.raises(ValueError, match="separator="):
        load_tokenizer(path)
    tokenizer = load_tokenizer(path, "[STOP]")
    assert tokenizer.separator_token == "[STOP]"
    assert tokenizer.separator == 0
    with pytest.raises(ValueError, match="none of <gone>"):
        load_tokenizer(path, "<gone>")
    with pytest.raises(ValueError, match="own separator"):
        load_tokenizer("bytes", "<eos>")


def test_fingerprint_follows_the_file(tmp_path):
    a = load_tokenizer(train(tmp_path / "a.json", ["<eos>"]))
    b = load_tokenizer(train(tmp_path / "b.json", ["</s>"]))
    assert a.fingerprint != b.fingerprint
    assert a.fingerprint == load_tokenizer(str(a.path)).fingerprint


def test_bad_files(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(FileNotFoundError, match="no tokenizer file"):
        load_tokenizer(str(tmp_path / "absent.json"))
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json' is not a tokenizer\.json"):
        load_tokenizer(str(bad))


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[hf\]'"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_continuation_is_decoded_with_its_prompt():
    """A word's space, and a character of several bytes that the prompt cuts."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"▁hello": 0, "▁world": 1, "</s>": 2}, "</s>")
    )
    words.decoder = tokenizers.decoders.Metaspace()

    class Words:
        """Decodes only."""

        decode = staticmethod(words.decode)

    assert words.decode([1]) == "world"
    assert continuation(Words(), [0], [1, 0]) == " world hello"
    text = "né".encode()
    assert continuation(ByteTokenizer(), [*text[:2]], [*text[2:], 33]) == "é!"
    assert continuation(ByteTokenizer(), [], [256, 65]) == "A"
