"""Text to token ids and back: raw bytes, or a Hugging Face `tokenizer.json`.

Both tokenizers have `encode`, `decode`, `vocab_size`, `separator` (the id between
documents), `token_bytes` (how many bytes of text each id stands for, which turns a loss
per token into bits per byte), `name` and `fingerprint` (which a corpus records, so that
it is never read with another tokenizer).
"""

import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

END_OF_TEXT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|im_end|>",
    "<｜end▁of▁sentence｜>",
)


class ByteTokenizer:
    """One token a byte of UTF-8; id 256 separates documents."""

    vocab_size = 257
    separator = 256
    name = "bytes"
    fingerprint = "bytes"

    @property
    def token_bytes(self) -> Int[np.ndarray, "vocab"]:
        """The bytes of text that each id stands for: 1, and 0 for the separator."""
        return np.array([1] * 256 + [0], np.int32)

    def encode(self, text: str | bytes) -> Int[np.ndarray, "tokens"]:
        """Return the bytes of `text` as uint16 ids, without separators."""
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.uint16)

    def decode(self, ids: Int[np.ndarray, "tokens"] | Sequence[int]) -> str:
        """Return the text of `ids`, without separators; bad UTF-8 becomes U+FFFD."""
        ids = _as_ids(ids, self.vocab_size)
        return (
            ids[ids != self.separator]
            .astype(np.uint8)
            .tobytes()
            .decode(errors="replace")
        )


class HuggingFaceTokenizer:
    """A tokenizer stored in the `tokenizer.json` format of Hugging Face.

    Args:
        path: the `tokenizer.json` file.
        separator: the token between documents; None takes the first of the usual
            end-of-text tokens that the vocabulary has.

    Raises:
        ImportError: the `tokenizers` package is not installed.
        FileNotFoundError, ValueError: there is no such file, or it is not a tokenizer.
    """

    def __init__(self, path: str | pathlib.Path, separator: str | None = None):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                "Reading a tokenizer.json needs the `tokenizers` package, which is not "
                "installed; get it with `pip install -e '.[hf]'`, or use the tokenizer "
                "'bytes', which needs nothing."
            ) from error
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"There is no tokenizer file at {str(path)!r}; give the path of a "
                "tokenizer.json, or 'bytes' for one token a byte."
            )
        data = self.path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(
                f"{str(path)!r} is not a tokenizer.json that the `tokenizers` package "
                f"can read ({error})."
            ) from error
        # A document that spells out "<|endoftext|>" must not become a separator.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name = self.path.name
        # Ids may have gaps, so the highest id counts, not the number of tokens.
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.separator_token = self._find_separator(separator)
        self.separator = self._tokenizer.token_to_id(self.separator_token)
        self.fingerprint = hashlib.sha256(data).hexdigest()

    def _find_separator(self, separator: str | None) -> str:
        candidates = END_OF_TEXT if separator is None else (separator,)
        for token in candidates:
            if self._tokenizer.token_to_id(token) is not None:
                return token
        raise ValueError(
            f"The vocabulary of {str(self.path)!r} holds none of "
            f"{', '.join(candidates)}, so there is no token to put between documents; "
            "name one of its tokens, as in "
            "HuggingFaceTokenizer(path, separator='[END]') or "
            "CorpusConfig(tokenizer=path, separator='[END]')."
        )

    @functools.cached_property
    def token_bytes(self) -> Int[np.ndarray, "vocab"]:
        """The bytes of text that each id stands for; 0 for special tokens.

        Exact for byte-level BPE and, except for a leading space in each document, for
        SentencePiece-like vocabularies. For a tokenizer that rewrites text (lower case,
        dropped spaces) no exact number exists, and the bytes of the token are counted.
        """
        spec = json.loads(self._tokenizer.to_str())
        special = {t["id"] for t in spec["added_tokens"] if t["special"]}
        special.add(self.separator)
        added = {t["id"] for t in spec["added_tokens"]}
        # In byte-level vocabularies one character stands for one byte.
        byte_level = '"ByteLevel"' in json.dumps(
            [spec.get("pre_tokenizer"), spec.get("decoder")]
        )
        table = np.zeros(self.vocab_size, np.int32)
        for token, index in self._tokenizer.get_vocab().items():
            if index in special:
                continue
            if byte_level and index not in added:
                table[index] = len(token)
            elif re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
                table[index] = 1
            else:
                table[index] = len(token.replace("▁", " ").encode())
        return table

    def encode(self, text: str | bytes) -> Int[np.ndarray, "tokens"]:
        """Return the uint32 ids of `text`, without separators or other additions.

        Raises:
            ValueError: the vocabulary has no token for a part of it, not even [UNK].
        """
        text = text.decode() if isinstance(text, bytes) else text
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the package raises bare Exception
            raise ValueError(
                f"The tokenizer {str(self.path)!r} cannot encode the text that begins "
                f"with {text[:40]!r} ({error}); take one that covers all text, such as "
                "'bytes'."
            ) from error
        return np.array(ids, np.uint32)

    def decode(self, ids: Int[np.ndarray, "tokens"] | Sequence[int]) -> str:
        """Return the text of `ids`, without separators."""
        ids = _as_ids(ids, self.vocab_size)
        return self._tokenizer.decode(
            ids[ids != self.separator].tolist(), skip_special_tokens=False
        )


Tokenizer = ByteTokenizer | HuggingFaceTokenizer


def continuation(
    tokenizer: Tokenizer,
    prompt: Int[np.ndarray, "tokens"] | Sequence[int],
    ids: Int[np.ndarray, "tokens"] | Sequence[int],
) -> str:
    """Return the text that `ids` add to that of `prompt`.

    The two are decoded together: the text of a token may depend on those before it, as
    the space in front of a word and the bytes of a character do.
    """
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    return whole[len(os.path.commonprefix([before, whole])) :]


def load_tokenizer(spec: str, separator: str | None = None) -> Tokenizer:
    """Return the tokenizer that `spec` names.

    Args:
        spec: "bytes", or the path of a tokenizer.json.
        separator: the token between documents; only for a tokenizer.json.

    Raises:
        ValueError: a separator was given for bytes; `HuggingFaceTokenizer` has others.
    """
    if spec != "bytes":
        return HuggingFaceTokenizer(spec, separator)
    if separator is not None:
        raise ValueError(
            f"The tokenizer 'bytes' has its own separator (id 256), but "
            f"separator={separator!r} was given; leave it None."
        )
    return ByteTokenizer()


def _as_ids(ids, vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.size == 0:
        return ids.astype(np.int64)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"Token ids are integers, but these are {ids.dtype}.")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"Token ids lie in 0..{vocab_size - 1}, but these span {ids.min()}.."
            f"{ids.max()}."
        )
    return ids.reshape(-1)
