"""Text files to a corpus on disk (see `jaxlab.data.corpus`).

`build` reads its sources twice, to check them before anything is written and then to
write them, and holds one document and one shard of tokens in memory at a time. It
writes beside the directory and renames at the end: a corpus is whole or absent.

Whole files are held out. Of a corpus of a single file its rows are, or blocks of its
text, so that there is something to evaluate on.
"""

import collections
import dataclasses
import errno
import glob
import hashlib
import itertools
import json
import logging
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from jaxlab.data.corpus import FORMAT, SPLITS, Corpus, open_corpus
from jaxlab.data.fidelity import RoundTrip
from jaxlab.data.ngrams import ngram_bits_per_byte
from jaxlab.data.reading import NotTextError, Reading, read
from jaxlab.data.sources import TextFile, counted, find_files, quoted
from jaxlab.data.splitting import assign_splits, block_borders
from jaxlab.data.storage import ArrayWriter, sha256_of
from jaxlab.data.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """The sources and settings of a corpus.

    Attributes:
        directory: where to put the corpus, a local path.
        sources: files, directories, globs and zip archives of .txt, .py, .md, .json,
            .jsonl and .parquet, each also as .gz, .bz2, .xz or .zst. A row of .jsonl,
            .json or .parquet is a document. Empty: the source of the running Python's
            standard library.
        tokenizer: "bytes" or the path of a tokenizer.json.
        separator: the token between documents; None takes a usual one of the
            tokenizer.json.
        heldout_fraction: the share of files to hold out, in (0, 1); of a single file,
            the share of its rows, or of the blocks that its text is cut into.
        text_key: the key or column that holds the text of a row.
    """

    directory: str
    sources: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    separator: str | None = None
    heldout_fraction: float = 0.05
    text_key: str = "text"

    def __post_init__(self):
        if isinstance(self.sources, str):
            raise ValueError(
                f"sources={self.sources!r} is one string, but it is a tuple of them; "
                f"write sources=({self.sources!r},)."
            )
        if "" in self.sources:
            raise ValueError(
                f"sources={self.sources!r} has an empty string, which names nothing; "
                "leave it out, or write '.' for the working directory."
            )
        if not self.text_key:
            raise ValueError(
                "text_key='' names no key; give the one that holds the text of a row, "
                "such as 'text'."
            )
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(
                f"heldout_fraction={self.heldout_fraction} is not between 0 and 1; it "
                "is the share of the files held out, for example 0.05."
            )


# Settings that a manifest holds only where they have another value than this.
LATER_SETTINGS = {"text_key": "text"}


def build(cfg: CorpusConfig, *, rebuild: bool = False) -> Corpus:
    """Build the corpus in cfg.directory, or open it if it is there already.

    Where several processes share the directory, one builds; the others wait for it and
    call `open_corpus`.

    Args:
        cfg: what to build.
        rebuild: replace a corpus that was built from something else.

    Raises:
        FileNotFoundError, ValueError: a source is missing, unreadable or empty, or the
            directory holds something else.
        ImportError: the package that reads a format is not installed.
        OSError: the disk is full.
    """
    target = pathlib.Path(cfg.directory)
    _remove_abandoned(target)
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.separator)
    found = find_files(cfg.sources, ignored=_files_of(target))
    request = {
        "sources": list(cfg.sources),
        "tokenizer": tokenizer.fingerprint,
        "separator": tokenizer.separator,
        "heldout_fraction": cfg.heldout_fraction,
        "text_key": cfg.text_key,
    }
    stats = {str(file.path): file.path.stat() for file in found.files}
    inputs = {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not rebuild:
            return _open_same(cfg.directory, request, inputs, found.files)
        if not (target / "manifest.json").is_file():
            raise ValueError(
                f"{cfg.directory!r} exists and is not a corpus, so it is not replaced; "
                "choose another directory."
            )
    for warning in found.warnings():
        log.warning("%s", warning)
    survey = _survey(found.files, cfg.text_key)
    stored = {k: v for k, v in request.items() if LATER_SETTINGS.get(k) != v}
    start = {"format": FORMAT, "request": stored, "inputs": inputs}
    scratch = _scratch(target, os.getpid())
    try:
        _write(scratch / "new", start, survey, tokenizer, cfg)
        if rebuild and target.exists():
            target.rename(scratch / "old")
        try:
            (scratch / "new").rename(target)
        except OSError:  # fine if another process has built it meanwhile
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
    return _open_same(cfg.directory, request, inputs, found.files)


# What is in the files -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Survey:
    """The files of a corpus after a first reading."""

    files: list[tuple[TextFile, dict]]  # each with its name, bytes and sha256
    documents: int
    skipped: list[dict]  # names and reasons


def _survey(files: list[TextFile], text_key: str) -> _Survey:
    good, skipped, empty, documents = [], [], 0, 0
    without_text = []
    for reading in read(files, text_key):
        try:
            entry, count = _measure(reading)
        except NotTextError as error:
            if reading.file.named:
                raise
            skipped.append({"name": reading.file.name, "reason": str(error)})
            continue
        if reading.skipped:
            without_text.append(reading)
        if count:
            good.append((reading.file, entry))
            documents += count
        else:
            empty += 1
    if skipped:
        names = [file["name"] for file in skipped]
        log.warning(
            "Skipped %s, not text: %s", counted(len(names), "file"), quoted(names)
        )
    if without_text:
        rows = sum(reading.skipped for reading in without_text)
        log.warning(
            "Skipped %s without text under %s, the first in %s %s",
            counted(rows, "row"),
            json.dumps(text_key),
            without_text[0].file.where,
            without_text[0].first_skipped,
        )
    if not good:
        reason = f" The first: {skipped[0]['reason']}" if skipped else ""
        raise ValueError(
            f"The corpus is empty: of {len(files)} files {empty} hold no text and "
            f"{len(skipped)} are not text. Name sources that hold text.{reason}"
        )
    return _Survey(good, documents, skipped)


def _measure(reading: Reading) -> tuple[dict, int]:
    """Return the manifest's entry of a file, and how many documents it has."""
    digest, count, size = hashlib.sha256(), 0, 0
    for text in reading:
        # The lengths keep two documents apart from their concatenation.
        digest.update(len(text).to_bytes(8) + text)
        count, size = count + 1, size + len(text)
    entry = {"name": reading.file.name, "bytes": size, "sha256": digest.hexdigest()}
    if reading.skipped:
        entry["skipped_rows"] = reading.skipped
    return entry, count


def _open_same(
    directory: str, request: dict, inputs: dict, files: list[TextFile]
) -> Corpus:
    """Open a corpus that must have been built from this request and these files."""
    corpus = open_corpus(directory)
    manifest = corpus.manifest
    built = LATER_SETTINGS | manifest["request"]
    for field, value in request.items():
        if built.get(field) != value:
            raise ValueError(
                f"{directory!r} was built with other {field}: {built.get(field)!r} "
                f"there, {value!r} asked for. {_WAY_OUT}"
            )
    # Files with the same sizes and times are the same. Otherwise they may have been
    # copied, touched or changed, so compare what they hold.
    if inputs == manifest["inputs"]:
        return corpus
    old = {(f["name"], f["sha256"]) for f in manifest["files"]}
    survey = _survey(files, request["text_key"])
    new = {(f["name"], f["sha256"]) for _, f in survey.files}
    if changed := sorted({name for name, _ in old ^ new}):
        raise ValueError(
            f"{directory!r} holds a corpus of other files: {len(changed)} were added, "
            f"removed or changed since, {changed[0]!r} first. {_WAY_OUT}"
        )
    return corpus


_WAY_OUT = (
    "Delete that directory, or pass rebuild=True, to build it anew; or name another "
    "directory in the CorpusConfig."
)


# Writing ------------------------------------------------------------------------------


def _write(
    directory: pathlib.Path,
    start: dict,
    survey: _Survey,
    tokenizer: Tokenizer,
    cfg: CorpusConfig,
) -> None:
    """Write a corpus whose manifest begins with `start`."""
    directory.mkdir(parents=True)
    writers = {split: _SplitWriter(directory / split, tokenizer) for split in SPLITS}
    round_trip = RoundTrip(tokenizer, len(survey.files))
    counts = collections.defaultdict(collections.Counter)  # by file and split
    for number, split, text in _placed(survey, cfg):
        round_trip.check(number, text)
        count = counts[number, split]
        count["documents"] += 1
        count["tokens"] += writers[split].append(text)
        count["bytes"] += len(text)
    files = [
        survey.files[number][1] | {"split": split} | count
        for (number, split), count in counts.items()
    ]
    shards = [shard for writer in writers.values() for shard in writer.close()]
    manifest = start | {
        "tokenizer": _tokenizer_entry(tokenizer, cfg.separator, round_trip),
        "splits": {split: _totals(files, split) for split in SPLITS},
        "files": files,
        "skipped": survey.skipped,
        "checksums": {
            shard.relative_to(directory).as_posix(): sha256_of(shard)
            for shard in shards
        },
    }
    if cfg.tokenizer != "bytes":
        shutil.copyfile(cfg.tokenizer, directory / "tokenizer.json")
    manifest["baselines"] = _baselines(Corpus(directory, manifest))
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _placed(survey: _Survey, cfg: CorpusConfig) -> Iterator[tuple[int, str, bytes]]:
    """Yield every document with the number of its file and its split."""
    readings = read([file for file, _ in survey.files], cfg.text_key)
    names = [entry["name"] for _, entry in survey.files]
    if len(names) == 1:
        for reading in readings:
            for split, text in _divided(names[0], reading, survey.documents, cfg):
                yield 0, split, text
        return
    splits = assign_splits(names, cfg.heldout_fraction)
    for number, reading in enumerate(readings):
        for text in reading:
            yield number, splits[number], text


def _divided(
    name: str, documents: Iterable[bytes], count: int, cfg: CorpusConfig
) -> Iterator[tuple[str, bytes]]:
    """Divide the documents of a file, or the blocks of its only one, by number."""
    if count == 1:
        [text] = documents
        borders = block_borders(text)
        count = len(borders) - 1
        documents = (text[a:b] for a, b in itertools.pairwise(borders))
    parts = (f"{name}\0{number}" for number in range(count))
    return zip(assign_splits(parts, cfg.heldout_fraction), documents, strict=True)


class _SplitWriter:
    """Writes the documents of a split, with the separator on both sides of each."""

    def __init__(self, directory: pathlib.Path, tokenizer: Tokenizer):
        # The fill value is no token: TensorStore leaves out blocks that hold only it.
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size < 2**16 else np.uint32)
        self._tokenizer = tokenizer
        self._border = np.array([tokenizer.separator], dtype)
        self._tokens = ArrayWriter(directory / "tokens", dtype)
        self._offsets = ArrayWriter(directory / "offsets", np.dtype("int64"))
        self._offsets.append(np.zeros(1, np.int64))
        self._directory = directory

    def append(self, text: bytes) -> int:
        """Write a document; return how many tokens it takes."""
        start = self._tokens.length
        tokens = self._tokenizer.encode(text).astype(self._border.dtype)
        for part in (self._border, tokens, self._border):
            self._tokens.append(part)
        self._offsets.append(np.array([self._tokens.length], np.int64))
        return self._tokens.length - start

    def close(self) -> list[pathlib.Path]:
        """Finish the arrays; return their shards."""
        self._tokens.close()
        self._offsets.close()
        arrays = (self._directory / name for name in ("tokens", "offsets"))
        return [shard for array in arrays for shard in sorted((array / "c").glob("*"))]


def _tokenizer_entry(
    tokenizer: Tokenizer, separator: str | None, round_trip: RoundTrip
) -> dict:
    entry = {
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "separator": separator,
    }
    if not round_trip.altered:
        return entry
    log.warning(
        "The tokenizer %r drops or changes %.3g%% of the text, by a sample of %d "
        "bytes, so bits per byte of this corpus cannot be compared with those of "
        "others. A tokenizer with a token for every byte, or 'bytes', changes nothing",
        tokenizer.name,
        100 * round_trip.lossy,
        round_trip.checked,
    )
    return entry | {"lossy": round_trip.lossy}


def _totals(files: list[dict], split: str) -> dict:
    """The counts of a split."""
    own = [file for file in files if file["split"] == split]
    keys = ("documents", "tokens", "bytes")
    return {"files": len(own)} | {key: sum(f[key] for f in own) for key in keys}


def _scratch(target: pathlib.Path, pid: int | str) -> pathlib.Path:
    name = f"{_scratch_prefix(target)}{socket.gethostname()}-{pid}"
    return target.absolute().parent / name


def _scratch_prefix(target: pathlib.Path) -> str:
    return f".{target.name}.building-"


def _files_of(target: pathlib.Path) -> Callable[[pathlib.Path], bool]:
    """Return what tells the paths of the corpus itself, which may lie in a source."""
    corpus, prefix = target.resolve(), _scratch_prefix(target)
    return lambda path: (
        path.is_relative_to(corpus)
        or any(part.startswith(prefix) for part in path.parts)
    )


def _remove_abandoned(target: pathlib.Path) -> None:
    """Remove what a killed build on this machine left behind."""
    scratch = _scratch(target, "")
    for path in scratch.parent.glob(glob.escape(scratch.name) + "*"):
        pid = path.name.removeprefix(scratch.name)
        if pid.isdigit() and not _runs(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    """Whether a build other than this one may have this process id."""
    try:
        os.kill(pid, 0)  # signal 0 only checks that it runs
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _baselines(corpus: Corpus) -> dict[str, float]:
    if corpus.tokenizer.fingerprint != "bytes" or not corpus.split("heldout").bytes:
        return {}
    orders = {"unigram": 1, "bigram": 2}
    return {name: ngram_bits_per_byte(corpus, n) for name, n in orders.items()}
