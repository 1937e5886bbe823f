"""Block sizes of the chunked form, tuned on two CPU cores in float32.

Of T tokens in chunks of C, T / C states are kept and C computed anew at a time. A CPU
is fastest while those C stay in its cache: at 64 of them the backward pass of the named
shapes takes up to twice as long.
"""

from pallas_kernels.platform import platform

ENTRIES_IN_CACHE = 2**19  # 2 MiB of float32


def chunk_size(tokens: int, entries: int) -> int:
    """Tokens a chunk where the caller names none.

    Args:
        tokens: T, the tokens there are.
        entries: of one token's states, over rows, channels and N.
    """
    size = 32
    if platform() == "cpu":
        size = max(8, min(32, ENTRIES_IN_CACHE // entries))
    return min(size, tokens)
