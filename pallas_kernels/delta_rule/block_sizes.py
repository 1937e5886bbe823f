"""Block sizes of the chunked form, tuned on two CPU cores in float32.

A chunk of C keys costs about C d for its pairs of keys and d^2 for its state, per key
and head of dimension d, so C is best near d / 2; below 32 keys the matrix products are
too small to be fast.
"""

from pallas_kernels.layout import round_up_to_power_of_two

# Rows of a diagonal block that is inverted row by row (see triangular.py).
SOLVE_BLOCK = 16


def chunk_size(tokens: int, steps: int, head_dim: int) -> int:
    """Tokens a chunk where the caller names none, a power of two.

    Args:
        tokens: T, the tokens there are.
        steps: N, the keys a token.
        head_dim: the larger of K and V.
    """
    keys = 64 if head_dim >= 128 else 32
    most = max(1, 3 * keys // (2 * steps))  # up to half more, for N = 3
    at_most = round_up_to_power_of_two(most + 1) // 2
    return min(at_most, keys, round_up_to_power_of_two(tokens))


def solve_block(keys: int) -> int:
    """Rows a diagonal block: the largest power of two that divides a chunk's keys."""
    return min(SOLVE_BLOCK, keys & -keys)
