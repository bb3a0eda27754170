"""Order statistics of vectors that are too long to be held."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ROOM = 1 << 22
"""Number of elements that are collected to be ranked at once, for each element asked for."""

_DIGIT = 16
_BITS = 64
_HALF = 1 << (_DIGIT - 1)


@dataclass
class _Search:
    """The place of one element in the order: the leading bits of its key are known, and its rank among those with them.

    Attributes:
        rank: from 0, among the elements that share the leading bits.
        shared: number of these elements.
        known: number of leading bits.
        prefix: these bits, as a signed number.
        counts: of the next digits, while they are counted.
        collected: the keys that share the prefix, when they are few enough.
    """

    rank: int
    shared: int
    known: int = 0
    prefix: int = 0
    counts: Tensor | None = None
    collected: list[Tensor] = field(default_factory=list)
    found: float | None = None

    def see(self, keys: Tensor, room: int) -> None:
        """Take a piece of the vector into account."""
        if self.known:
            keys = keys[keys >> (_BITS - self.known) == self.prefix]
        if self.shared <= room:
            self.collected.append(keys)
            return
        digits = keys >> (_BITS - self.known - _DIGIT)
        digits = digits & ((1 << _DIGIT) - 1) if self.known else digits + _HALF
        counts = digits.bincount(minlength=1 << _DIGIT)
        self.counts = counts if self.counts is None else self.counts + counts

    def conclude(self) -> None:
        """Learn from a pass."""
        if self.counts is None:
            keys = torch.cat(self.collected)
            self.found = _value(keys.kthvalue(self.rank + 1).values)
        else:
            sums = self.counts.cumsum(dim=0)
            digit = int(torch.searchsorted(sums, self.rank, right=True))
            self.rank -= int(sums[digit - 1]) if digit else 0
            self.shared = int(self.counts[digit])
            self.prefix = self.prefix << _DIGIT | digit if self.known else digit - _HALF
            self.known += _DIGIT
            if self.known == _BITS:
                self.found = _value(torch.tensor(self.prefix))
        self.counts, self.collected = None, []


def order_statistics(
    parts: Callable[[], Iterable[Sequence[Tensor]]], size: int, ranks: Sequence[Sequence[int]], room: int = ROOM
) -> list[list[float]]:
    """Return elements of several long vectors by their ranks; exact, whatever the order of the pieces.

    The bits of floating-point numbers, as signed integers, have their order. A pass counts how many elements have which
    leading 16 bits; those that share them with the element asked for are then usually few enough to be collected in a
    second one.

    Args:
        parts: begins a pass; yields corresponding pieces of all the vectors, flat, of any floating type, without NaN.
        size: the vectors' length, at least 1.
        ranks: for each vector the ranks asked for, 0 the smallest element's.
        room: see `ROOM`.
    """
    searches = [[_Search(rank, size) for rank in wanted] for wanted in ranks]
    while any(search.found is None for own in searches for search in own):
        for pieces in parts():
            for piece, own in zip(pieces, searches, strict=True):
                keys = _keys(piece)
                for search in own:
                    if search.found is None:
                        search.see(keys, room)
        for search in (search for own in searches for search in own):
            if search.found is None:
                search.conclude()
    return [[search.found or 0.0 for search in own] for own in searches]


def _keys(numbers: Tensor) -> Tensor:
    """Signed integers in the order of the numbers."""
    bits = numbers.double().view(torch.int64)
    return bits ^ ((bits >> (_BITS - 1)) & torch.iinfo(torch.int64).max)


def _value(key: Tensor) -> float:
    """The number with that key."""
    bits = key ^ ((key >> (_BITS - 1)) & torch.iinfo(torch.int64).max)
    return float(bits.view(torch.float64))
