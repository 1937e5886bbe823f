"""Block sizes of the chunked form, tuned on two CPU cores in float32.

A chunk of C tokens costs about C d for its pairs of tokens and d^2 for its state, per
token and head of dimension d, so C is best near d / 2; the time is flat around it.
"""

from pallas_kernels.layout import round_up_to_power_of_two


def chunk_size(tokens: int, head_dim: int) -> int:
    """The default number of tokens in a chunk, a power of two.

    Args:
        tokens: T, the number of all tokens.
        head_dim: the larger of K and V.
    """
    return min(64 if head_dim >= 64 else 32, round_up_to_power_of_two(tokens))
