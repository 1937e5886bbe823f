"""Sources of text: the files that they hold.

A source is a file, a directory, a glob or a zip archive. `jaxlab.data.reading` reads
the documents of the files.
"""

import collections
import dataclasses
import functools
import glob
import os
import pathlib
import sysconfig
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence

from jaxlab.data.decompression import OPENERS

KINDS = (".txt", ".py", ".md", ".json", ".jsonl", ".parquet")
WHAT_IS_READ = (
    f"{', '.join(KINDS)}, each also as {', '.join(OPENERS)}, and .zip archives of them"
)

# What keeps a link or a directory from being read.
NOWHERE = "links that lead nowhere"
LOOP = "links that lead back to a directory above them"
CLOSED = "directories without the permission to read them"


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
    def compression(self) -> str:
        """The ending that tells how it is compressed, such as ".gz", or ""."""
        return _ending(self.name.lower(), OPENERS)

    @property
    def kind(self) -> str:
        """The ending that tells what it holds, or "" if a corpus does not read it."""
        archives = (".zip",) if self.member is None and not self.compression else ()
        name = self.name.lower().removesuffix(self.compression)
        return _ending(name, (*KINDS, *archives))


def _ending(name: str, endings: Iterable[str]) -> str:
    return next((ending for ending in endings if name.endswith(ending)), "")


@dataclasses.dataclass
class Found:
    """What the sources hold.

    Attributes:
        files: the files that are read.
        left_out: the files with another extension.
        not_followed: links and directories, by what keeps them from being read.
    """

    files: list[TextFile] = dataclasses.field(default_factory=list)
    left_out: list[TextFile] = dataclasses.field(default_factory=list)
    not_followed: dict[str, list[pathlib.Path]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )

    def warnings(self) -> Iterator[str]:
        """Yield a sentence for each reason to leave something out."""
        if self.left_out:
            suffixes = collections.Counter(_suffix(file.name) for file in self.left_out)
            counts = [
                f"{n} {_printable(suffix) or 'without a suffix'}"
                for suffix, n in suffixes.most_common()
            ]
            yield (
                f"Left out {counted(len(self.left_out), 'file')} that a corpus does "
                f"not read: {_shortened(counts)} (it reads {WHAT_IS_READ})"
            )
        for reason, paths in self.not_followed.items():
            yield f"Left out {reason}: {quoted(sorted({str(path) for path in paths}))}"


def counted(count: int, noun: str) -> str:
    """Return "1 file" or "2 files"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def quoted(names: Sequence[str]) -> str:
    """Return the first names of a list in a form that can be printed."""
    return _shortened([repr(name) for name in names])


def _printable(text: str) -> str:
    return repr(text)[1:-1]


def _shortened(words: Sequence[str], shown: int = 8) -> str:
    more = [f"and {len(words) - shown} more"] * (len(words) > shown)
    return ", ".join([*words[:shown], *more])


def _suffix(name: str) -> str:
    """The suffix of a file that is not read, with that of its compression."""
    suffixes = pathlib.PurePosixPath(name.lower()).suffixes
    last = 2 if suffixes and suffixes[-1] in OPENERS else 1
    return "".join(suffixes[-last:])


def find_files(
    sources: Sequence[str], *, ignored: Callable[[pathlib.Path], bool]
) -> Found:
    """Return the files of all sources, each once; without sources, Python's library.

    Args:
        sources: files, directories, globs and archives.
        ignored: whether to pass over the files in a directory, without a word.

    Raises:
        FileNotFoundError, ValueError: a source is missing, or holds nothing to read.
    """
    found = Found()
    if not sources:
        found.files = _standard_library()
        return found
    seen = {}  # a file that two sources name is read once, under its first name
    for source in sources:
        files = [f for file in _find_source(source, found) for f in _members(file)]
        if not any(file.kind for file in files):
            raise ValueError(
                f"None of the files of {source!r} has an extension that a corpus "
                f"reads: {WHAT_IS_READ}."
            )
        for file in files:
            seen.setdefault((_identity(file), file.member), file)
    passed_over = functools.cache(lambda directory: ignored(directory.resolve()))
    for file in seen.values():
        if passed_over(file.path.parent):
            continue
        (found.files if file.kind else found.left_out).append(file)
    return found


def _identity(file: TextFile) -> pathlib.Path:
    """The path by which a file is known when others lead to it."""
    return file.path.resolve() if file.kind else file.path


def _standard_library() -> list[TextFile]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    foreign = {"site-packages", "dist-packages", "__pycache__"}
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    names = sorted(path.as_posix() for path in found if not foreign & {*path.parts})
    return [TextFile(name, root / name) for name in names]


def _find_source(source: str, found: Found) -> list[TextFile]:
    """Return the files of a source, and note in `found` what is not followed."""
    path = pathlib.Path(source)
    if path.is_file():
        file = TextFile(path.name, path, named=True)
        if not file.kind:
            raise ValueError(
                f"{source!r} has the unknown extension {_suffix(path.name)!r}; a "
                f"corpus reads {WHAT_IS_READ}."
            )
        return [file]
    if path.is_dir():
        return _files_below(path, found)
    if glob.has_magic(source):
        return _matching_files(path, found)
    raise FileNotFoundError(
        f"There is no file or directory at {source!r}; check the path."
    )


def _members(file: TextFile) -> list[TextFile]:
    """Return the members of an archive, or the file itself."""
    if file.kind != ".zip":
        return [file]
    try:
        with zipfile.ZipFile(file.path) as archive:
            members = sorted(i.filename for i in archive.infolist() if not i.is_dir())
    except (zipfile.BadZipFile, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{str(file.path)!r} is not a whole zip archive ({error}); fetch it again."
        ) from error
    return [TextFile(f"{file.name}/{member}", file.path, member) for member in members]


# Directories and globs ----------------------------------------------------------------


def _files_below(root: pathlib.Path, found: Found) -> list[TextFile]:
    # A file that is also reached through a link to a directory has its own name.
    paths = []
    for directory, linked in _walk(root, found):
        within = directory.relative_to(root)
        paths += [(linked, str(within / p.name), p) for p in directory.iterdir()]
    return _text_files([(name, path) for _, name, path in sorted(paths)], found)


def _matching_files(pattern: pathlib.Path, found: Found) -> list[TextFile]:
    # Names are relative to the part of the glob that exists as it is written.
    root = next(parent for parent in pattern.parents if os.path.exists(parent))
    parts = pattern.relative_to(root).parts
    paths = sorted(
        (p.relative_to(root).as_posix(), p) for p in _glob(root, parts, found)
    )
    files = _text_files(paths, found)
    if not files:
        raise FileNotFoundError(
            f"No file matches {str(pattern)!r}; check the glob (** crosses "
            "directories)."
        )
    return files


def _text_files(
    paths: Sequence[tuple[str, pathlib.Path]], found: Found
) -> list[TextFile]:
    """Return each file among the paths once, under its first name, sorted by name."""
    files = {}
    for name, path in paths:
        if os.path.isfile(path):
            file = TextFile(name, path)
            files.setdefault(_identity(file), file)
        elif os.path.islink(path) and not os.path.exists(path):
            found.not_followed[NOWHERE].append(path)
    return sorted(files.values(), key=lambda file: file.name)


def _glob(
    root: pathlib.Path, parts: Sequence[str], found: Found
) -> Iterator[pathlib.Path]:
    """Yield what matches below root, as `glob.glob` does, but around no loop."""
    if "**" not in parts:
        for name in glob.glob(os.path.join(*parts), root_dir=root):
            yield root / name
        return
    position = parts.index("**")
    before, after = parts[:position], parts[position + 1 :] or ("*",)
    for top in _glob(root, before, found) if before else [root]:
        for directory, _ in _walk(top, found, hidden=False):
            yield from _glob(directory, after, found)


def _walk(
    top: pathlib.Path, found: Found, *, hidden: bool = True
) -> Iterator[tuple[pathlib.Path, bool]]:
    """Yield top and the directories below it, and whether a link leads to each."""
    todo = [(top, False, frozenset())] if os.path.isdir(top) else []
    while todo:
        directory, linked, above = todo.pop()
        status = directory.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            found.not_followed[LOOP].append(directory)
            continue
        if not os.access(directory, os.R_OK | os.X_OK):
            found.not_followed[CLOSED].append(directory)
            continue
        yield directory, linked
        todo += [
            (path, linked or path.is_symlink(), above | {here})
            for path in directory.iterdir()
            if os.path.isdir(path) and (hidden or not path.name.startswith("."))
        ]
