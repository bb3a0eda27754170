"""Selection from vectors that are too long to be held."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_DIGIT = 16
_SHIFTS = (48, 32, 16, 0)


def kth_magnitudes(
    parts: Callable[[], Iterable[Sequence[Tensor]]], rank_of: Callable[[int], int], count: int
) -> list[float]:
    """Return for each of several long vectors the magnitude that is the k-th smallest; exact, whatever the order.

    The bits of a magnitude, as a whole number, have its order: four passes find them 16 at a time, by counting.

    Args:
        parts: begins a pass; yields corresponding pieces of all the vectors, in any order, of any floating type.
        rank_of: k, from 1, for a vector of the given length; 0 asks for nothing, and is answered with 0.
        count: number of vectors.
    """
    prefixes = [0] * count
    ranks: list[int] | None = None
    for shift in _SHIFTS:
        counts = torch.zeros(count, 1 << _DIGIT, dtype=torch.int64)
        for pieces in parts():
            for number, piece in enumerate(pieces):
                counts[number] += _digits(piece, shift, prefixes[number])
        if ranks is None:
            ranks = [rank_of(int(row.sum())) for row in counts]
        for number, row in enumerate(counts):
            digit, ranks[number] = _find(row, ranks[number])
            prefixes[number] = prefixes[number] << _DIGIT | digit
    bits = torch.tensor(prefixes, dtype=torch.int64)
    found: list[float] = bits.view(torch.float64).tolist()
    return found


def _digits(piece: Tensor, shift: int, prefix: int) -> Tensor:
    """How often each digit follows the prefix."""
    bits = piece.reshape(-1).double().abs().view(torch.int64) >> shift
    digits = bits[bits >> _DIGIT == prefix] & ((1 << _DIGIT) - 1)
    return digits.bincount(minlength=1 << _DIGIT).cpu()


def _find(counts: Tensor, rank: int) -> tuple[int, int]:
    """The digit of the element of that rank, and its rank among those that share it."""
    if rank == 0:
        return 0, 0
    sums = counts.cumsum(dim=0)
    digit = int(torch.searchsorted(sums, rank))
    return digit, rank - (int(sums[digit - 1]) if digit else 0)
