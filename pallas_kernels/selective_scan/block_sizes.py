"""Block sizes of the chunked form, tuned on two CPU cores in float32.

With T tokens in chunks of C, T / C states are stored and C at a time are recomputed. A
CPU is fastest while those C stay in its cache: with 64 of them the backward pass of the
named shapes takes up to twice as long.
"""

from pallas_kernels.platform import platform

ENTRIES_IN_CACHE = 2**19  # 2 MiB of float32


def chunk_size(tokens: int, entries: int) -> int:
    """The default number of tokens in a chunk.

    Args:
        tokens: T, the number of all tokens.
        entries: entries of the states at one token, over rows, channels and N.
    """
    size = 32
    if platform() == "cpu":
        size = max(8, min(32, ENTRIES_IN_CACHE // entries))
    return min(size, tokens)
