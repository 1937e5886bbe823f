"""Streams of bytes out of compressed ones: gzip, bzip2, xz and zstandard."""

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

# Of the bytes that a frame of zstandard may look back on, as a power of two: the most
# that its format allows, which `zstd --long=31` uses.
WINDOW = 31


def _open_zstandard(stream: IO[bytes]) -> io.BufferedReader:
    try:
        start_frame, failure = _zstandard()
    except ImportError as error:
        raise ImportError(
            f"Reading {str(stream.name)!r} needs the `zstandard` package, which is not "
            "installed; get it with `pip install -e '.[hf]'`."
        ) from error
    return io.BufferedReader(_Chunks(_decompress(stream, start_frame, failure)))


# By the ending of a file's name. All take a stream and are context managers.
OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


def is_damage(error: Exception) -> bool:
    """Whether damaged data made a decompressor raise `error`."""
    if isinstance(error, OSError):
        return error.errno is None  # errors of the disk have a number
    damage = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
    return isinstance(error, damage)


def _zstandard() -> tuple[Callable[[], Any], type[Exception]]:
    """Return what makes a decompressor of one frame, and the error that it raises."""
    try:
        from compression import zstd  # pyright: ignore (since Python 3.14)
    except ImportError:
        import zstandard

        decompressor = zstandard.ZstdDecompressor(max_window_size=2**WINDOW)
        return decompressor.decompressobj, zstandard.ZstdError
    options = {zstd.DecompressionParameter.window_log_max: WINDOW}
    return lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError


def _decompress(
    stream: IO[bytes], start_frame: Callable[[], Any], failure: type[Exception]
) -> Iterator[bytes]:
    """Yield what frames laid end to end hold.

    Raises:
        OSError, EOFError: the data are damaged, or cut short.
    """
    frame = None
    while data := stream.read(2**16):
        while data:
            frame = frame or start_frame()
            try:
                yield frame.decompress(data)
            except failure as error:
                raise OSError(str(error)) from error  # without a number, as bz2 does
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("it ends in the middle of a frame")


class _Chunks(io.RawIOBase):
    """A stream of the bytes that an iterator yields."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
