"""The documents of files of text.

A text file is one document; so is every row of a .jsonl, .json or .parquet file.
"""

import contextlib
import io
import itertools
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from jaxlab.data.decompression import OPENERS, is_damage
from jaxlab.data.sources import TextFile

Row = tuple[str, Any]  # where in its file it is, such as "line 3", and what it holds


class NotTextError(ValueError):
    """The file is not UTF-8 text, or is a .json file of something else."""


class RowsError(ValueError):
    """The rows of a file are not rows of text."""


def read(files: Sequence[TextFile], text_key: str) -> Iterator["Reading"]:
    """Yield a `Reading` of each file; take its documents before the next one.

    Raises (while the documents are read):
        NotTextError: the file is not UTF-8, holds NUL bytes, or is a .json file of
            something else.
        ValueError: it is damaged, or its rows have no text under `text_key`.
        ImportError: the package that reads its format is not installed.
    """
    for path, group in itertools.groupby(files, lambda file: file.path):
        members = list(group)
        zipped = members[0].member is not None
        with zipfile.ZipFile(path) if zipped else contextlib.nullcontext() as archive:
            for file in members:
                yield Reading(file, text_key, archive)


class Reading:
    """The documents of a file, as bytes of UTF-8, to be iterated over once.

    Empty documents are left out.

    Attributes:
        file: the file.
        skipped: the rows without text, among those that have been read.
        first_skipped: where the first of them is.
    """

    def __init__(
        self, file: TextFile, text_key: str, archive: zipfile.ZipFile | None = None
    ):
        self.file = file
        self.skipped = 0
        self.first_skipped = ""
        self._text_key = text_key
        self._archive = archive

    def __iter__(self) -> Iterator[bytes]:
        file = self.file
        with _damage_named(file), _opened(file, self._archive) as stream:
            if file.kind not in ROWS:
                yield from filter(None, [_whole_text(stream, file.where)])
                return
            rows = ROWS[file.kind](stream, file.where, self._text_key)
            try:
                yield from self._texts(rows)
            except RowsError as error:
                if file.kind != ".json":
                    raise
                # Settings and other things that are no corpus are called .json too.
                raise NotTextError(str(error)) from error

    def _texts(self, rows: Iterable[Row]) -> Iterator[bytes]:
        where, key = self.file.where, self._text_key
        keys: dict[str, None] = {}  # of the rows, up to the first that has the key
        for place, row in rows:
            if not isinstance(row, dict):
                raise RowsError(
                    f"{where} {place} is {type(row).__name__}, but every row must be "
                    f"an object like {json.dumps({key: '...'})}."
                )
            if key not in keys:
                keys.update(dict.fromkeys(row))
            text = row.get(key)
            if text is None or text == "":
                self.skipped += 1
                self.first_skipped = self.first_skipped or place
            elif isinstance(text, str):
                yield _encoded(text, f"{where} {place}", key)
            else:
                raise RowsError(
                    f"{where} {place}: {json.dumps(key)} is {type(text).__name__}, "
                    "not a string."
                )
        if self.skipped and key not in keys:
            raise _no_key(where, key, keys)


def _encoded(text: str, where: str, key: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise RowsError(
            f"{where}: character {error.start} of {json.dumps(key)} is half of a "
            "surrogate pair, which is not text; correct the escape."
        ) from error


def _no_key(where: str, key: str, keys: Iterable[str]) -> RowsError:
    there = ", ".join(map(json.dumps, keys)) or "nothing"
    return RowsError(
        f"{where} has {json.dumps(key)} in none of its rows; they have {there}. Name "
        "the one that holds the text as text_key in the CorpusConfig, or leave the "
        "file out."
    )


@contextlib.contextmanager
def _opened(file: TextFile, archive: zipfile.ZipFile | None) -> Iterator[IO[bytes]]:
    with contextlib.ExitStack() as stack:
        if archive is None or file.member is None:
            stream = stack.enter_context(file.path.open("rb"))
        else:
            stream = stack.enter_context(archive.open(file.member))
        if file.compression:
            stream = stack.enter_context(OPENERS[file.compression](stream))
        yield stream


@contextlib.contextmanager
def _damage_named(file: TextFile) -> Iterator[None]:
    """Put the file's name into errors that say it is damaged."""
    try:
        yield
    except RuntimeError as error:  # a password, a rare method of compression
        raise ValueError(f"{file.where} cannot be read: {error}.") from error
    except Exception as error:
        if not is_damage(error):
            raise
        raise ValueError(
            f"{file.where} cannot be decompressed ({error}); fetch it again."
        ) from error


def _whole_text(stream: IO[bytes], where: str) -> bytes:
    data = stream.read()
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise NotTextError(
            f"{where} is not text: byte {error.start} ({data[error.start]:#04x}) is "
            "not valid UTF-8. Convert the file to UTF-8, or leave it out."
        ) from error
    if (position := data.find(b"\0")) >= 0:
        raise NotTextError(
            f"{where} is not text: byte {position} is NUL. Leave the file out."
        )
    return data


# Rows ---------------------------------------------------------------------------------


def _jsonl_rows(stream: IO[bytes], where: str, key: str) -> Iterator[Row]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RowsError(
                f"{where} line {number} is not JSON ({error}); every line must be an "
                f"object like {json.dumps({key: '...'})}."
            ) from error
        yield f"line {number}", row


def _json_rows(stream: IO[bytes], where: str, key: str) -> Iterator[Row]:
    """One array of rows, one row, or lines as in .jsonl."""
    data = stream.read()
    if not data.strip():
        return
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        if _is_json(data.lstrip().partition(b"\n")[0]):
            yield from _jsonl_rows(io.BytesIO(data), where, key)
            return
        raise RowsError(
            f"{where} is not JSON ({error}); it must be an array of objects like "
            f"{json.dumps({key: '...'})}, or one of them, or one on each line."
        ) from error
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield f"row {number}", row


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _parquet_rows(stream: IO[bytes], where: str, key: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"Reading {where} needs the `pyarrow` package, which is not installed; get "
            "it with `pip install -e '.[hf]'`."
        ) from error
    with _seekable(stream) as file:
        number = 0
        try:
            table = pyarrow.parquet.ParquetFile(file)
            columns = table.schema_arrow.names
            if key not in columns:
                raise _no_key(where, key, columns)
            batches = table.iter_batches(batch_size=1024, columns=[key])
            values = (value for batch in batches for value in batch.column(0))
            for number, value in enumerate(values, 1):
                yield f"row {number}", {key: value.as_py()}
        except UnicodeDecodeError as error:
            raise RowsError(
                f"{where} row {number}: {json.dumps(key)} is not valid UTF-8 ({error})."
            ) from error
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"{where} is not a whole parquet file ({error}); fetch it again."
            ) from error


@contextlib.contextmanager
def _seekable(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    """Yield the stream, or a copy on disk where it can only be read from its start."""
    if stream.seekable():
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy)
        copy.seek(0)
        yield copy


ROWS = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
