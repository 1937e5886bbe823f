"""A corpus on disk: token arrays in TensorStore, in two splits.

A corpus is a directory:

    manifest.json            the request, every file read, counts, shard checksums
    tokenizer.json           only with a Hugging Face tokenizer
    train/tokens             zarr3, 1-D: [separator] document [separator], end to end
    train/offsets            zarr3, int64 [documents + 1]: where each document starts
    heldout/tokens, heldout/offsets

`jaxlab.data.building` makes one of text files.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence

import numpy as np
import tensorstore as ts
from jaxtyping import Int

from jaxlab.data import storage
from jaxlab.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = 2
SPLITS = ("train", "heldout")


def open_corpus(directory: str) -> "Corpus":
    """Open a corpus that `build` made.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged or has another
            version of the format.
    """
    path = pathlib.Path(directory) / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(directory)!r} holds no corpus (there is no manifest.json in it); "
            "build one there with jaxlab.data.build, in a new or empty directory."
        )
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{str(path)!r} is not the manifest of a corpus ({error}); delete the "
            "directory and build the corpus again."
        ) from error
    if version != FORMAT:
        raise ValueError(
            f"{str(directory)!r} has corpus format {version}, but this version reads "
            f"format {FORMAT}; delete the directory and build the corpus again."
        )
    return Corpus(pathlib.Path(directory), manifest)


class Corpus:
    """A corpus on disk: its manifest, its tokenizer and its two splits."""

    def __init__(self, directory: pathlib.Path, manifest: dict):
        self.directory = directory
        self.manifest = manifest

    @property
    def vocab_size(self) -> int:
        return self.manifest["tokenizer"]["vocab_size"]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the corpus was built with (kept inside the directory)."""
        wanted = self.manifest["tokenizer"]
        if wanted["fingerprint"] == "bytes":
            return load_tokenizer("bytes")
        path = self.directory / "tokenizer.json"
        tokenizer = load_tokenizer(str(path), wanted["separator"])
        if tokenizer.fingerprint != wanted["fingerprint"]:
            raise ValueError(
                f"{str(path)!r} is not the tokenizer that the corpus was built with "
                f"(sha256 {tokenizer.fingerprint[:12]}..., built with "
                f"{wanted['fingerprint'][:12]}...); put it back, or build again."
            )
        return tokenizer

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens, their order and their splits."""
        tokens = [self.manifest[key] for key in ("tokenizer", "splits", "checksums")]
        return hashlib.sha256(json.dumps(tokens, sort_keys=True).encode()).hexdigest()

    @property
    def baselines(self) -> dict[str, float]:
        """Held-out bits per byte of n-grams, where tokens are bytes."""
        return self.manifest["baselines"]

    def split(self, name: str) -> "Documents":
        """Return the documents of "train" or "heldout"."""
        if name not in SPLITS:
            raise ValueError(
                f"There is no split {name!r}; a corpus has {' and '.join(SPLITS)}."
            )
        return Documents(
            self.directory / name,
            self.manifest["splits"][name],
            {
                key.removeprefix(f"{name}/"): checksum
                for key, checksum in self.manifest["checksums"].items()
                if key.startswith(f"{name}/")
            },
            self.tokenizer.token_bytes,
        )


class Documents:
    """The documents of one split: `documents[i]` is int32 [tokens] with separators.

    They are opened when first read, and can be pickled. Every shard is checked against
    its checksum before any of it is used.

    Attributes:
        bytes: bytes of text in the split.
        tokens: tokens in the split, separators included.
        token_bytes: bytes of text each token id stands for.
    """

    def __init__(
        self,
        path: pathlib.Path,
        counts: dict,
        checksums: dict[str, str],
        token_bytes: Int[np.ndarray, "vocab"],
    ):
        self.bytes = counts["bytes"]
        self.tokens = counts["tokens"]
        self.token_bytes = token_bytes
        self._path = path.absolute()
        self._count = counts["documents"]
        self._checksums = checksums
        self._stores: dict[str, ts.TensorStore] = {}
        self._checked: set[str] = set()
        self._offsets: np.ndarray | None = None  # read when first asked for

    def __getstate__(self):
        return self.__dict__ | {"_stores": {}, "_checked": set(), "_offsets": None}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Int[np.ndarray, "tokens"]:
        if not isinstance(index, int | np.integer):
            raise TypeError(f"A document is asked for by its number, not by {index!r}.")
        if not -self._count <= index < self._count:
            raise IndexError(f"Document {index} of {self._count} does not exist.")
        index %= self._count
        start, stop = self.offsets[index : index + 2]
        return self.read([(int(start), int(stop))])[0]

    @property
    def offsets(self) -> Int[np.ndarray, "documents+1"]:
        """The offsets in the stream at which documents start, and the stream's end."""
        if self._offsets is None:
            self._offsets = self._read("offsets", [(0, self._count + 1)])[0]
        return self._offsets

    def read(
        self, ranges: Sequence[tuple[int, int]]
    ) -> list[Int[np.ndarray, "tokens"]]:
        """Return the tokens in each half-open range of the stream, as int32."""
        return [part.astype(np.int32) for part in self._read("tokens", ranges)]

    def _read(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        for start, stop in ranges:
            for shard in range(start // storage.SHARD, -(-stop // storage.SHARD)):
                self._check(f"{name}/c/{shard}")
        if name not in self._stores:
            # The files never change, so the cache is never out of date.
            spec = storage.location(self._path / name) | {"recheck_cached_data": False}
            spec["context"] = {"cache_pool": {"total_bytes_limit": 2**26}}
            self._stores[name] = ts.open(spec, open=True, read=True).result()
        store = self._stores[name]
        pending = [store[start:stop].read() for start, stop in ranges]
        return [future.result() for future in pending]

    def _check(self, shard: str) -> None:
        if shard in self._checked:
            return
        path = self._path / shard
        if not path.is_file() or storage.sha256_of(path) != self._checksums.get(shard):
            problem = "does not match its checksum" if path.is_file() else "is missing"
            raise ValueError(
                f"The shard {str(path)!r} {problem}, so the corpus is damaged; delete "
                f"{str(self._path.parent)!r} and build it again, or restore the file."
            )
        self._checked.add(shard)
