"""Block sizes of the chunked form, tuned on two CPU cores in float32.

A chunk of C keys costs about C d for its pairs of keys and d^2 for its state, per key
and head of dimension d, so C is best near d / 2; below 32 keys the matrix products are
too small to be fast.
"""

from pallas_kernels.layout import round_up_to_power_of_two

# Rows of a diagonal block that is inverted row by row (see triangular.py).
SOLVE_BLOCK = 16


def chunk_size(tokens: int, steps: int, head_dim: int) -> int:
    """The default number of tokens in a chunk, a power of two.

    Args:
        tokens: T, the number of all tokens.
        steps: N, the number of keys per token.
        head_dim: the larger of K and V.
    """
    keys = 64 if head_dim >= 128 else 32
    most = max(1, 3 * keys // (2 * steps))  # up to 1.5 times as many, for N = 3
    rounded_down = round_up_to_power_of_two(most + 1) // 2
    return min(rounded_down, keys, round_up_to_power_of_two(tokens))


def solve_block(keys: int) -> int:
    """Rows of a diagonal block: the largest power of two that divides the keys."""
    return min(SOLVE_BLOCK, keys & -keys)
