"""Block sizes of the chunked form."""

# Rows of a diagonal block that is inverted on its own (see triangular.py).
SOLVE_BLOCK = 16


def chunk_size(tokens: int, steps: int) -> int:
    """Tokens a chunk when the caller names none: about 64 keys, a power of two."""
    size = 64
    while size * steps > 96 and size > 1:
        size //= 2
    return round_up_to_power_of_two(min(size, tokens))


def round_up_to_power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size` (>= 1)."""
    return 1 << (size - 1).bit_length()


def solve_block(keys: int) -> int:
    """Rows a diagonal block: the widest power of two that divides the chunk's keys."""
    return min(SOLVE_BLOCK, keys & -keys)
