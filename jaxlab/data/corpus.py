"""Text files to a corpus on disk: token arrays in TensorStore, split by file.

A corpus is a directory:

    manifest.json            what was asked, every file read, counts, shard checksums
    tokenizer.json           only with a Hugging Face tokenizer
    train/tokens             zarr3, 1-D: [separator] document [separator], end to end
    train/offsets            zarr3, int64 [documents + 1]: where each document starts
    heldout/tokens, heldout/offsets

`build` reads its sources twice, to check them before anything is written and then to
write them, and holds one document and one shard of tokens in memory at a time. It
writes beside the directory and renames at the end: a corpus is whole or absent.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
import socket
from collections.abc import Sequence

import numpy as np
import tensorstore as ts
from jaxtyping import Int

from jaxlab.data.ngrams import ngram_bits_per_byte
from jaxlab.data.sources import NotTextError, TextFile, find_files, read
from jaxlab.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = 2
SPLITS = ("train", "heldout")
# A shard is one file; a block is the least that is read and decompressed at once.
SHARD = 2**20
BLOCK = 2**14

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What a corpus is made of.

    Attributes:
        directory: where the corpus goes (a local path).
        sources: files, directories, globs and zip archives of .txt, .py, .md, .jsonl
            and .parquet, each also as .gz. A .jsonl line or a .parquet row is a
            document of its own, its text under "text". Empty: the source of the
            running Python's standard library.
        tokenizer: "bytes" or the path of a tokenizer.json.
        separator: the token between documents, where a tokenizer.json has no usual one.
        heldout_fraction: share of the files held out, in (0, 1).
    """

    directory: str
    sources: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    separator: str | None = None
    heldout_fraction: float = 0.05

    def __post_init__(self):
        if isinstance(self.sources, str):
            raise ValueError(
                f"sources={self.sources!r} is one string, but it is a tuple of them; "
                f"write sources=({self.sources!r},)."
            )
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(
                f"heldout_fraction={self.heldout_fraction} is not between 0 and 1; it "
                "is the share of the files held out, for example 0.05."
            )


def build(cfg: CorpusConfig, *, rebuild: bool = False) -> "Corpus":
    """Builds the corpus in cfg.directory, or opens it if it is there already.

    Of several processes that share the directory one builds; the others wait for it and
    call `open_corpus`.

    Args:
        cfg: what to build.
        rebuild: replace a corpus that was built from something else.

    Raises:
        FileNotFoundError, ValueError: a source that is missing, unreadable or empty, or
            a directory that holds something else.
        OSError: the disk is full.
    """
    target = pathlib.Path(cfg.directory)
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.separator)
    files = find_files(cfg.sources)
    request = {
        "sources": list(cfg.sources),
        "tokenizer": tokenizer.fingerprint,
        "separator": tokenizer.separator,
        "heldout_fraction": cfg.heldout_fraction,
    }
    stats = {str(file.path): file.path.stat() for file in files}
    inputs = {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not rebuild:
            corpus = open_corpus(cfg.directory)
            _check_same(corpus, request, inputs, files)
            return corpus
        if not (target / "manifest.json").is_file():
            raise ValueError(
                f"{cfg.directory!r} exists and is no corpus, so it is not replaced; "
                "choose another directory."
            )

    survey = _survey(files)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    scratch = _scratch(target, os.getpid())
    new = scratch / "new"
    new.mkdir(parents=True)
    try:
        manifest = {
            "format": FORMAT,
            "request": request,
            "tokenizer": {
                "name": tokenizer.name,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "separator": cfg.separator,
            },
            "inputs": inputs,
        } | _write(new, survey, tokenizer, cfg.heldout_fraction)
        if cfg.tokenizer != "bytes":
            shutil.copyfile(cfg.tokenizer, new / "tokenizer.json")
        manifest["baselines"] = _baselines(Corpus(new, manifest))
        (new / "manifest.json").write_text(json.dumps(manifest, indent=1))
        if rebuild and target.exists():
            target.rename(scratch / "old")
        try:
            new.rename(target)
        except OSError:  # unless another process has built it meanwhile
            if not (target / "manifest.json").is_file():
                raise
    except Exception as error:
        # TensorStore reports a full disk as a ValueError.
        full = getattr(error, "errno", None) == errno.ENOSPC
        if not full and "No space left" not in str(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"The disk that holds {str(target.parent)!r} filled up while the corpus "
            "was written, and what was written is removed again; free some space or "
            "choose another directory",
            str(target),
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    corpus = open_corpus(cfg.directory)
    _check_same(corpus, request, inputs, files)
    return corpus


def open_corpus(directory: str) -> "Corpus":
    """Opens a corpus that `build` made.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged or of another
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


# What is in the files -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Survey:
    """What a first reading found."""

    files: list[tuple[TextFile, dict]]  # with name, bytes and sha256
    skipped: list[dict]  # name and reason


def _survey(files: list[TextFile]) -> _Survey:
    good, skipped, empty = [], [], 0
    for file, documents in read(files):
        digest, count, size = hashlib.sha256(), 0, 0
        try:
            for text in documents:
                # The lengths keep two documents apart from their concatenation.
                digest.update(len(text).to_bytes(8) + text)
                count, size = count + 1, size + len(text)
        except NotTextError as error:
            if file.named:
                raise
            skipped.append({"name": file.name, "reason": str(error)})
            continue
        if count == 0:
            empty += 1
            continue
        entry = {"name": file.name, "bytes": size, "sha256": digest.hexdigest()}
        good.append((file, entry))
    if skipped:
        names = ", ".join(s["name"] for s in skipped[:5])
        more = ", ..." if len(skipped) > 5 else ""
        log.warning(
            "Skipped %d files that are not text: %s%s", len(skipped), names, more
        )
    if not good:
        raise ValueError(
            f"The corpus is empty: of {len(files)} files {empty} hold no text and "
            f"{len(skipped)} are not UTF-8. Name sources that hold text."
        )
    return _Survey(good, skipped)


def _check_same(corpus: "Corpus", request: dict, inputs: dict, files: list[TextFile]):
    """Raises ValueError if the corpus was built from another request or other files."""
    manifest = corpus.manifest
    for field, value in request.items():
        if manifest["request"].get(field) != value:
            raise ValueError(
                f"{str(corpus.directory)!r} was built with other {field}: "
                f"{manifest['request'].get(field)!r} there, {value!r} asked for. "
                + _WAY_OUT
            )
    # Same sizes and times: the same files. Otherwise (copied, touched, changed) look
    # at what they hold.
    if inputs == manifest["inputs"]:
        return
    old = {(f["name"], f["sha256"]) for f in manifest["files"]}
    new = {(f["name"], f["sha256"]) for _, f in _survey(files).files}
    if changed := sorted({name for name, _ in old ^ new}):
        raise ValueError(
            f"{str(corpus.directory)!r} holds a corpus of other files: {len(changed)} "
            f"were added, removed or changed since, {changed[0]!r} first. " + _WAY_OUT
        )


_WAY_OUT = (
    "Delete that directory to build it anew (in Python: rebuild=True), or choose "
    "another one with --data.corpus.directory."
)


# Writing ------------------------------------------------------------------------------


def _assign_splits(names: Sequence[str], fraction: float) -> list[str]:
    """Splits by a hash of the name, so that other files never move a file."""
    scores = [
        int.from_bytes(hashlib.sha256(n.encode()).digest()[:8]) / 2**64 for n in names
    ]
    splits = ["heldout" if score < fraction else "train" for score in scores]
    if len(names) >= 2:  # neither split may be empty
        if "heldout" not in splits:
            splits[int(np.argmin(scores))] = "heldout"
        if "train" not in splits:
            splits[int(np.argmax(scores))] = "train"
    return splits


def _write(
    directory: pathlib.Path, survey: _Survey, tokenizer: Tokenizer, fraction: float
) -> dict:
    """Writes both splits; returns their part of the manifest."""
    # The fill value is no token: TensorStore leaves out blocks that hold nothing else.
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size < 2**16 else np.uint32)
    border = np.array([tokenizer.separator], dtype)
    splits = _assign_splits([entry["name"] for _, entry in survey.files], fraction)
    files = []
    writers = {
        split: {
            "tokens": _ArrayWriter(directory / split / "tokens", dtype),
            "offsets": _ArrayWriter(directory / split / "offsets", np.dtype("int64")),
        }
        for split in SPLITS
    }
    for split in SPLITS:
        writers[split]["offsets"].append(np.zeros(1, np.int64))
    texts = (documents for _, documents in read([file for file, _ in survey.files]))
    for (_, entry), split, documents in zip(survey.files, splits, texts, strict=True):
        tokens, offsets = writers[split]["tokens"], writers[split]["offsets"]
        start, count = tokens.length, 0
        for text in documents:
            for part in (border, tokenizer.encode(text).astype(dtype), border):
                tokens.append(part)
            offsets.append(np.array([tokens.length], np.int64))
            count += 1
        counts = {"documents": count, "tokens": tokens.length - start}
        files.append({**entry, "split": split, **counts})
    checksums = {}
    for split in SPLITS:
        for name, writer in writers[split].items():
            writer.close()
            for shard in sorted((directory / split / name / "c").glob("*")):
                key = f"{split}/{name}/c/{shard.name}"
                checksums[key] = _sha256(shard)
    totals = {
        split: {
            "files": sum(f["split"] == split for f in files),
            **{
                key: sum(f[key] for f in files if f["split"] == split)
                for key in ("documents", "tokens", "bytes")
            },
        }
        for split in SPLITS
    }
    return {
        "splits": totals,
        "files": files,
        "skipped": survey.skipped,
        "checksums": checksums,
    }


class _ArrayWriter:
    """Appends to a 1-D zarr3 array, a whole shard at a time."""

    def __init__(self, path: pathlib.Path, dtype: np.dtype):
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        zstd = {"name": "zstd", "configuration": {"level": 1}}
        sharding = {
            "chunk_shape": [BLOCK],
            "codecs": [little, zstd],
            "index_codecs": [little, {"name": "crc32c"}],
        }
        metadata = {
            "shape": [0],
            "data_type": dtype.name,
            "fill_value": int(np.iinfo(dtype).max),
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [SHARD]},
            },
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
        spec = _location(path) | {"metadata": metadata}
        self._store = ts.open(spec, create=True).result()
        self._buffer = np.empty(SHARD, dtype)
        self._filled = 0
        self._written = 0

    @property
    def length(self) -> int:
        return self._written + self._filled

    def append(self, values: np.ndarray) -> None:
        while len(values):
            part = values[: SHARD - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            values = values[len(part) :]
            if self._filled == SHARD:
                self._flush()

    def _flush(self) -> None:
        stop = self.length
        self._store = self._store.resize(exclusive_max=[stop]).result()
        self._store[self._written : stop].write(self._buffer[: self._filled]).result()
        self._written, self._filled = stop, 0

    def close(self) -> None:
        if self._filled:
            self._flush()


def _location(path: pathlib.Path) -> dict:
    kvstore = {"driver": "file", "path": str(path.absolute())}
    return {"driver": "zarr3", "kvstore": kvstore}


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _scratch(target: pathlib.Path, pid: int | str) -> pathlib.Path:
    name = f".{target.name}.building-{socket.gethostname()}-{pid}"
    return target.absolute().parent / name


def _remove_abandoned(target: pathlib.Path) -> None:
    """Removes what a killed build of this machine left behind."""
    prefix = _scratch(target, "").name
    for path in target.absolute().parent.iterdir():
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdigit():
            try:
                os.kill(int(pid), 0)  # signal 0 only asks whether it runs
            except ProcessLookupError:
                shutil.rmtree(path, ignore_errors=True)
            except PermissionError:
                pass


# Reading a corpus ---------------------------------------------------------------------


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
        """Equal for corpora of the same tokens in the same order and splits."""
        tokens = [self.manifest[key] for key in ("tokenizer", "splits", "checksums")]
        return hashlib.sha256(json.dumps(tokens, sort_keys=True).encode()).hexdigest()

    @property
    def baselines(self) -> dict[str, float]:
        """Held-out bits per byte of unigrams and bigrams, where tokens are bytes."""
        return self.manifest["baselines"]

    def split(self, name: str) -> "Documents":
        """Returns the documents of "train" or "heldout"."""
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

    Random access, opened when first read, picklable. Every shard is checked against its
    checksum before anything of it is used.

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
        """Where each document starts in the stream of tokens, and the stream's end."""
        if self._offsets is None:
            self._offsets = self._read("offsets", [(0, self._count + 1)])[0]
        return self._offsets

    def read(
        self, ranges: Sequence[tuple[int, int]]
    ) -> list[Int[np.ndarray, "tokens"]]:
        """Returns the tokens in each half-open range of the stream, as int32."""
        return [part.astype(np.int32) for part in self._read("tokens", ranges)]

    def _read(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        for start, stop in ranges:
            for shard in range(start // SHARD, -(-stop // SHARD)):
                self._check(f"{name}/c/{shard}")
        if name not in self._stores:
            # The files never change, so what is cached need not be looked at again.
            spec = _location(self._path / name) | {"recheck_cached_data": False}
            spec["context"] = {"cache_pool": {"total_bytes_limit": 2**26}}
            self._stores[name] = ts.open(spec, open=True, read=True).result()
        store = self._stores[name]
        pending = [store[start:stop].read() for start, stop in ranges]
        return [future.result() for future in pending]

    def _check(self, shard: str) -> None:
        if shard in self._checked:
            return
        path = self._path / shard
        if not path.is_file() or _sha256(path) != self._checksums.get(shard):
            found = "does not match its checksum" if path.is_file() else "is missing"
            raise ValueError(
                f"The shard {str(path)!r} {found}, so the corpus is damaged; delete "
                f"{str(self._path.parent)!r} and build it again, or restore the file."
            )
        self._checked.add(shard)


def _baselines(corpus: Corpus) -> dict[str, float]:
    if corpus.tokenizer.fingerprint != "bytes" or not corpus.split("heldout").bytes:
        return {}
    orders = {"unigram": 1, "bigram": 2}
    return {name: ngram_bits_per_byte(corpus, n) for name, n in orders.items()}
