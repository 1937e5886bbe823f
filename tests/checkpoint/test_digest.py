"""The digest of an array: its values, whatever their sharding."""

import ml_dtypes
import numpy as np
import pytest
from saved_states import mesh, put

from jaxlab.checkpoint.digest import digest


def oracle_mix(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    return h ^ (h >> 16)


@pytest.mark.parametrize(
    "dtype, word",
    [
        (np.float32, np.uint32),
        (ml_dtypes.bfloat16, np.uint16),
        (ml_dtypes.float8_e4m3fn, np.uint8),
        (np.int32, np.uint32),
        (np.uint8, np.uint8),
        (bool, np.uint8),
        (np.complex64, np.uint32),
    ],
)
def test_digest_against_python_integers(dtype, word):
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(dtype)
    words = [int(w) for w in np.ascontiguousarray(x).view(word).ravel()]
    expected = sum(oracle_mix(w ^ oracle_mix(i)) for i, w in enumerate(words)) % 2**32
    assert int(digest(x)) == expected


@pytest.mark.parametrize("spec", [(), ("data",), ("tensor", "data"), (None, "tensor")])
def test_digest_does_not_depend_on_sharding(spec):
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    sharded = digest(put(x, mesh(4, 2), *spec))
    assert sharded.is_fully_replicated
    assert int(sharded) == int(digest(x))


def test_digest_sees_one_bit_and_every_swap():
    # Words that differ in high bits only are where weighted sums fail.
    x = np.array([1.0, 2.0, -1.0, 0.0, -0.0, np.nan, np.inf, 4.0], np.float32)
    seen = {int(digest(x))}
    for bit in range(32):
        for i in range(len(x)):
            y = x.copy()
            y.view(np.uint32)[i] ^= np.uint32(1 << bit)
            seen.add(int(digest(y)))
    assert len(seen) == 1 + 32 * len(x)
    swapped = set()
    for i in range(len(x)):
        for j in range(i):
            y = x.copy()
            y[[i, j]] = y[[j, i]]
            swapped.add(int(digest(y)))
    assert len(swapped) == len(x) * (len(x) - 1) // 2 and int(digest(x)) not in swapped
