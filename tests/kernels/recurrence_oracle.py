"""A recurrence's float64 oracle over a stream of sequences, one sequence at a time."""

from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Tokens of a row that follow each other, and the states at their two ends.

    Attributes:
        start: the index of the initial state; None for a state of zeros.
        end: the index of the final state; None if the last state is dropped.
    """

    row: int
    tokens: np.ndarray
    start: int | None
    end: int | None


def segmented(op, inputs, segment_ids):
    """Results where each segment of a row is apart; ids < 0 are padding."""
    pieces = []
    for row, ids in enumerate(segment_ids):
        tokens = np.flatnonzero(ids >= 0)
        runs = np.split(tokens, np.flatnonzero(np.diff(ids[tokens])) + 1)
        for i, run in enumerate(runs):
            start = row if i == 0 else None
            end = row if i == len(runs) - 1 else None
            pieces.append(Piece(row, run, start, end))
    return _in_pieces(op, inputs, pieces)


def ragged(op, inputs, cu_seqlens):
    """Results of the sequences of the only row, each with states of its own."""
    bounds = zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)
    pieces = [Piece(0, np.arange(*pair), s, s) for s, pair in enumerate(bounds)]
    return _in_pieces(op, inputs, pieces)


def _in_pieces(op, inputs, pieces):
    given = {name: x for name, x in inputs.items() if x is not None}
    like = {f"d_{name}": x for name, x in given.items() if not name.startswith("d_")}
    like |= {op.output: given[f"d_{op.output}"], "state": given["d_state"]}
    results = {name: np.zeros(x.shape) for name, x in like.items()}
    for piece in pieces:
        part = {name: _part(op, name, x, piece) for name, x in inputs.items()}
        for name, x in op.oracle(**part).items():
            if name.removeprefix("d_") in op.weights:
                results[name] += x
            elif not name.endswith("state"):
                results[name][piece.row, piece.tokens] = x[0]
            else:
                index = piece.start if name == "d_initial_state" else piece.end
                if index is not None:
                    results[name][index] = x[0]
    return results


def _part(op, name, x, piece):
    """What a piece has of an input."""
    if x is None or name in op.weights:
        return x
    if not name.endswith("state"):
        return x[piece.row : piece.row + 1, piece.tokens]
    index = piece.start if name == "initial_state" else piece.end
    return np.zeros_like(x[:1]) if index is None else x[index : index + 1]
