"""Sources of text: the files they hold, and the documents in each file.

A source is a file, a directory, a glob or a zip archive. A text file is one document;
so is every line of a .jsonl and every row of a .parquet.
"""

import contextlib
import dataclasses
import glob
import gzip
import itertools
import json
import pathlib
import sysconfig
import zipfile
import zlib
from collections.abc import Iterator, Sequence

SUFFIXES = (".txt", ".py", ".md", ".jsonl", ".parquet")


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of documents, on disk or inside a zip archive."""

    name: str  # relative to its source; decides the split
    path: pathlib.Path  # of the file, or of the archive that holds it
    member: str | None = None
    named: bool = False  # named by the user by itself, so that it must be text

    @property
    def where(self) -> str:
        """The file as an error names it."""
        return repr(str(self.path)) + (f", member {self.member!r}," * bool(self.member))

    @property
    def kind(self) -> str:
        return pathlib.PurePosixPath(self.name.removesuffix(".gz")).suffix


def _is_readable(name: str) -> bool:
    return name.removesuffix(".gz").endswith((*SUFFIXES, ".zip"))


def find_files(sources: Sequence[str]) -> list[TextFile]:
    """Return the files of all sources, each once; without sources, Python's library."""
    if not sources:
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        foreign = {"site-packages", "dist-packages", "__pycache__"}
        found = (p.relative_to(root) for p in root.rglob("*.py"))
        names = sorted(p.as_posix() for p in found if not foreign & {*p.parts})
        return [TextFile(name, root / name) for name in names]
    found = {}  # a file that two sources name is read once, under its first name
    for file in (file for source in sources for file in _find_source(source)):
        found.setdefault((file.path.resolve(), file.member), file)
    return [*found.values()]


def _find_source(source: str) -> list[TextFile]:
    path = pathlib.Path(source)
    if path.is_file():
        if not _is_readable(path.name):
            raise ValueError(
                f"{source!r} has the unknown extension {path.suffix!r}; a corpus reads "
                f"{', '.join(SUFFIXES)}, each also as .gz, and .zip archives of them."
            )
        return _expand(TextFile(path.name, path, named=True))
    if path.is_dir():
        root, paths = path, [p for p in path.rglob("*") if p.is_file()]
    elif glob.has_magic(source):
        # Names are relative to the part of the glob that has no magic in it.
        fixed = [*path.parts]
        while glob.has_magic("/".join(fixed)):
            fixed.pop()
        root = pathlib.Path(*fixed)
        matches = map(pathlib.Path, glob.glob(source, recursive=True))
        paths = [p for p in matches if p.is_file()]
        if not paths:
            raise FileNotFoundError(
                f"No file matches {source!r}; check the glob (** crosses directories)."
            )
    else:
        raise FileNotFoundError(
            f"There is no file or directory at {source!r}; check the path."
        )
    paths = [p for p in paths if _is_readable(p.name)]
    if not paths:
        raise ValueError(
            f"None of the files of {source!r} has an extension that a corpus reads: "
            f"{', '.join(SUFFIXES)}, each also as .gz, and .zip archives of them."
        )
    names = sorted((p.relative_to(root).as_posix(), p) for p in paths)
    return [file for name, p in names for file in _expand(TextFile(name, p))]


def _expand(file: TextFile) -> list[TextFile]:
    """Return the members of an archive, or the file itself."""
    if file.kind != ".zip":
        return [file]
    try:
        with zipfile.ZipFile(file.path) as archive:
            members = [i.filename for i in archive.infolist() if not i.is_dir()]
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{str(file.path)!r} is not a whole zip archive ({error}); fetch it again."
        ) from error
    members = sorted(m for m in members if _is_readable(m) and not m.endswith(".zip"))
    if not members:
        raise ValueError(
            f"{str(file.path)!r} holds no file with an extension that a corpus reads: "
            f"{', '.join(SUFFIXES)}, each also as .gz."
        )
    return [TextFile(f"{file.name}/{member}", file.path, member) for member in members]


class NotTextError(ValueError):
    """The file is not UTF-8 text."""


def read(files: Sequence[TextFile]) -> Iterator[tuple[TextFile, Iterator[bytes]]]:
    """Yield each file with an iterator over its documents, as bytes of UTF-8.

    Empty documents are left out. Read all documents of a file before the next file.

    Raises (while the documents are read):
        NotTextError: the file is not UTF-8 or holds NUL bytes.
        ValueError: it is broken in another way, or lacks the field "text".
    """
    for path, group in itertools.groupby(files, lambda file: file.path):
        members = list(group)
        zipped = members[0].member is not None
        with zipfile.ZipFile(path) if zipped else contextlib.nullcontext() as archive:
            for file in members:
                yield file, _documents(file, archive)


def _documents(file: TextFile, archive: zipfile.ZipFile | None) -> Iterator[bytes]:
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    try:
        with contextlib.ExitStack() as stack:
            if archive is None or file.member is None:
                stream = stack.enter_context(file.path.open("rb"))
            else:
                stream = stack.enter_context(archive.open(file.member))
            if file.name.endswith(".gz"):
                stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
            for text in readers.get(file.kind, _whole_text)(stream, file.where):
                if text:
                    yield text
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{file.where} cannot be decompressed ({error}); fetch it again."
        ) from error
    except (RuntimeError, NotImplementedError) as error:  # a password, a rare method
        raise ValueError(f"{file.where} cannot be read: {error}.") from error


def _whole_text(stream, where: str) -> Iterator[bytes]:
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
    yield data


def _jsonl_rows(stream, where: str) -> Iterator[bytes]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{where} line {number} is not JSON ({error}); every line must be an "
                'object like {"text": "..."}.'
            ) from error
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise ValueError(
                f'{where} line {number} has no string under "text"; every line must be '
                'an object like {"text": "..."}.'
            )
        try:
            yield text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f'{where} line {number}: character {error.start} of "text" is half of '
                "a surrogate pair, which is not text; correct the escape."
            ) from error


def _parquet_rows(stream, where: str) -> Iterator[bytes]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"Reading {where} needs the `pyarrow` package, which is not installed; get "
            "it with `pip install -e '.[hf]'`."
        ) from error
    try:
        table = pyarrow.parquet.ParquetFile(stream)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{where} is not a whole parquet file ({error}).") from error
    if "text" not in table.schema_arrow.names:
        raise ValueError(
            f'{where} has no column "text" (its columns: '
            f"{', '.join(table.schema_arrow.names)}); rename the one that holds the "
            "text."
        )
    number = 0
    for batch in table.iter_batches(batch_size=1024, columns=["text"]):
        for text in batch.column(0).to_pylist():
            number += 1
            if not isinstance(text, str):
                raise ValueError(
                    f'{where} row {number}: "text" is {type(text).__name__}, not a '
                    "string."
                )
            yield text.encode()
