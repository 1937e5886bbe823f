"""The arrays of a corpus on disk: 1-D, in zarr3, one file a shard."""

import hashlib
import pathlib

import numpy as np
import tensorstore as ts

# A shard is one file; a block is the least that is read and decompressed at once.
SHARD = 2**20
BLOCK = 2**14


class ArrayWriter:
    """Writes a 1-D zarr3 array, a whole shard at a time."""

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
        spec = location(path) | {"metadata": metadata}
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


def location(path: pathlib.Path) -> dict:
    """TensorStore's spec of the array at a path."""
    kvstore = {"driver": "file", "path": str(path.absolute())}
    return {"driver": "zarr3", "kvstore": kvstore}


def sha256_of(path: pathlib.Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
