"""What the tests of corpora share: building them, their contents, and refusals."""

import numpy as np
import pytest

from jaxlab.data import CorpusConfig, build


def config(tmp_path, *sources, **kwargs):
    return CorpusConfig(
        directory=str(tmp_path / "corpus"), sources=tuple(map(str, sources)), **kwargs
    )


def documents(corpus, split):
    """The documents of a split as text, in their order."""
    tokenizer = corpus.tokenizer
    found = []
    for ids in corpus.split(split):
        assert ids.dtype == np.int32
        assert ids[0] == ids[-1] == tokenizer.separator
        assert tokenizer.separator not in ids[1:-1]
        found.append(tokenizer.decode(ids))
    return found


def contents(corpus):
    """All documents of both splits as text."""
    return sorted(documents(corpus, "train") + documents(corpus, "heldout"))


def refuse(tmp_path, error, message, *sources, **kwargs):
    with pytest.raises(error, match=message):
        build(config(tmp_path, *sources, **kwargs))
    assert not (tmp_path / "corpus").exists()


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
