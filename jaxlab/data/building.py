"""Text files to a corpus on disk (see `jaxlab.data.corpus`).

`build` reads its sources twice, to check them before anything is written and then to
write them, and holds one document and one shard of tokens in memory at a time. It
writes beside the directory and renames at the end: a corpus is whole or absent.
"""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import pathlib
import shutil
import socket
from collections.abc import Sequence

import numpy as np

from jaxlab.data.corpus import FORMAT, SPLITS, Corpus, open_corpus
from jaxlab.data.ngrams import ngram_bits_per_byte
from jaxlab.data.sources import NotTextError, TextFile, find_files, read
from jaxlab.data.storage import ArrayWriter, sha256_of
from jaxlab.data.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """The sources and settings of a corpus.

    Attributes:
        directory: where to put the corpus, a local path.
        sources: files, directories, globs and zip archives of .txt, .py, .md, .jsonl
            and .parquet, each also as .gz. A line of .jsonl or a row of .parquet is a
            document, with its text under "text". Empty: the source of the running
            Python's standard library.
        tokenizer: "bytes" or the path of a tokenizer.json.
        separator: the token between documents; None takes a usual one of the
            tokenizer.json.
        heldout_fraction: the share of files to hold out, in (0, 1).
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
                f"{cfg.directory!r} exists and is not a corpus, so it is not replaced; "
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
    corpus = open_corpus(cfg.directory)
    _check_same(corpus, request, inputs, files)
    return corpus


# What is in the files -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Survey:
    """The files of a corpus after a first reading."""

    files: list[tuple[TextFile, dict]]  # each with its name, bytes and sha256
    skipped: list[dict]  # names and reasons


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


def _check_same(corpus: Corpus, request: dict, inputs: dict, files: list[TextFile]):
    """Raise ValueError if the corpus was built from another request or other files."""
    manifest = corpus.manifest
    for field, value in request.items():
        if manifest["request"].get(field) != value:
            raise ValueError(
                f"{str(corpus.directory)!r} was built with other {field}: "
                f"{manifest['request'].get(field)!r} there, {value!r} asked for. "
                + _WAY_OUT
            )
    # Files with the same sizes and times are the same. Otherwise they may have been
    # copied, touched or changed, so compare what they hold.
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
    "Delete that directory, or pass rebuild=True, to build it anew; or name another "
    "directory in the CorpusConfig."
)


# Writing ------------------------------------------------------------------------------


def _assign_splits(names: Sequence[str], fraction: float) -> list[str]:
    """Split by a hash of the name, so that no file moves when others come or go."""
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
    """Write both splits; return their part of the manifest."""
    # The fill value is not a token: TensorStore leaves out blocks that hold only it.
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size < 2**16 else np.uint32)
    border = np.array([tokenizer.separator], dtype)
    splits = _assign_splits([entry["name"] for _, entry in survey.files], fraction)
    files = []
    writers = {
        split: {
            "tokens": ArrayWriter(directory / split / "tokens", dtype),
            "offsets": ArrayWriter(directory / split / "offsets", np.dtype("int64")),
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
                checksums[key] = sha256_of(shard)
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


def _scratch(target: pathlib.Path, pid: int | str) -> pathlib.Path:
    name = f".{target.name}.building-{socket.gethostname()}-{pid}"
    return target.absolute().parent / name


def _remove_abandoned(target: pathlib.Path) -> None:
    """Remove what a killed build on this machine left behind."""
    prefix = _scratch(target, "").name
    for path in target.absolute().parent.iterdir():
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdigit():
            try:
                os.kill(int(pid), 0)  # signal 0 only checks that it runs
            except ProcessLookupError:
                shutil.rmtree(path, ignore_errors=True)
            except PermissionError:
                pass


def _baselines(corpus: Corpus) -> dict[str, float]:
    if corpus.tokenizer.fingerprint != "bytes" or not corpus.split("heldout").bytes:
        return {}
    orders = {"unigram": 1, "bigram": 2}
    return {name: ngram_bits_per_byte(corpus, n) for name, n in orders.items()}
