"""How much of a text a tokenizer gives back.

One that drops or changes letters predicts less than the text, so that its bits per byte
cannot be compared with those of others.
"""

import collections

from jaxlab.data.tokenizer import ByteTokenizer, Tokenizer

SAMPLE = 2**20  # bytes of a corpus that are checked


class RoundTrip:
    """Encodes and decodes a sample of a corpus, and counts what does not come back.

    Args:
        tokenizer: the tokenizer of the corpus.
        files: how many files share the sample.

    Attributes:
        checked: bytes of text that were checked.
        altered: bytes of them that did not come back, or came back as others.
    """

    def __init__(self, tokenizer: Tokenizer, files: int):
        self.checked = 0
        self.altered = 0
        self._tokenizer = tokenizer
        self._share = max(SAMPLE // files, 2**10)
        self._of_file = collections.Counter()

    @property
    def lossy(self) -> float:
        """The share of the sample that did not come back."""
        return self.altered / max(self.checked, 1)

    def check(self, file: int, text: bytes) -> None:
        """Check a document of a file, unless enough has been."""
        left = min(SAMPLE - self.checked, self._share - self._of_file[file])
        if isinstance(self._tokenizer, ByteTokenizer) or left <= 0:
            return
        part = _start(text, left)
        self.altered += altered_bytes(self._tokenizer, part)
        self.checked += len(part.encode())
        self._of_file[file] += min(left, len(text))


def _start(text: bytes, length: int) -> str:
    """The start of a text, without the word that the length cuts."""
    if len(text) <= length:
        return text.decode()
    start = text[:length].decode(errors="ignore")
    return start[: max(start.rfind(" "), start.rfind("\n")) + 1] or start


def altered_bytes(tokenizer: Tokenizer, text: str) -> int:
    """Return how many bytes of `text` do not survive encoding and decoding.

    Spaces at the start do not count, because SentencePiece adds or takes one there.
    """
    before = text.lstrip(" ")
    after = tokenizer.decode(tokenizer.encode(text)).lstrip(" ")
    if before == after:
        return 0
    # By characters, wherever they are: aligning the two texts would take long.
    old, new = collections.Counter(before), collections.Counter(after)
    sizes = [
        sum(count * len(character.encode()) for character, count in counts.items())
        for counts in (old - new, new - old)
    ]
    return min(max(*sizes), len(text.encode()))
