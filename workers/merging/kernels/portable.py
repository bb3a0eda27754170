"""The kernels in torch, for GPUs: the same operations in the same order, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from workers.merging.kernels.terms import Chance, Combine, Limits, RankedChance, Term, Vote

BLOCK = 1 << 24
"""Elements at once: starting a kernel on a GPU costs as much as 10 MB of memory traffic."""
_BITS, _LONG = 2**32 - 1, 2**64 - 1


def fused_sum(out: Tensor, tensors: Sequence[Tensor], weights: Sequence[float]) -> None:
    """See `workers.merging.kernels.fused_sum`; all flat."""
    work = _work(out, tensors)
    for part in _parts(out):
        total = tensors[0][part].to(work) * weights[0]
        for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
            total += tensor[part].to(work) * weight  # two operations: a fused one would round differently
        out[part].copy_(total)


def merge_sparse(
    out: Tensor,
    tensors: Sequence[Tensor],
    terms: Sequence[Term],
    vote: Vote | None,
    combine: Combine,
    scale: float,
    begin: int,
) -> None:
    """See `workers.merging.kernels.merge_sparse`; ``tensors`` are the base's and the models', flat."""
    work = _work(out, tensors)
    for part in _parts(out):
        base = tensors[0][part].to(work)
        sums = _Sums(base, vote, combine)
        for tensor, term in zip(tensors[1:], terms, strict=True):
            delta = tensor[part].to(work) - base
            sums.add(_kept(delta, term, part, begin), abs(_rounded(term.weight, work)))
        out[part].copy_(base + sums.merged() * scale)


def keep_mask(select: Limits | Chance | RankedChance, delta: Tensor, first: int, part: slice) -> Tensor:
    """Return which entries of a task vector's block are kept.

    Args:
        select: the rule.
        delta: the block, flat; only its magnitudes matter, and only to `Limits`.
        first: number of its first element in the parameter.
        part: where the block is in the stretch that `RankedChance.ranks` belongs to.
    """
    if isinstance(select, Limits):
        size = delta.abs()
        return (size >= _rounded(select.low, delta.dtype)) & (size <= _rounded(select.high, delta.dtype))
    lot = lots(select.seed, first, delta.numel(), delta.device)
    if isinstance(select, Chance):
        return lot <= select.top
    return (lot >> 8).to(torch.float32) * 2.0**-24 < probabilities(select, part)


def probabilities(select: RankedChance, part: slice) -> Tensor:
    """Return the probabilities of a block's entries, float32."""
    ranks = (select.ranks[part].to(torch.int32) & 0xFFFF).to(torch.float32)
    return ranks * float(np.float32(select.step)) + float(np.float32(select.lowest))


def lots(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Return 32 random bits for each of the elements ``first`` … ``first + count - 1`` of a parameter, as int64.

    A hash of seed and element number: the number's upper half and the seed make 64 bits (Steele's "splitmix64"), of which
    one half is added before the first and the other before the second multiplication of the number's lower half (as in
    Wellons' "lowbias32").
    """
    out, end = [], first + count
    while first < end:
        upper, stop = first >> 32, min(end, ((first >> 32) + 1) << 32)
        low, high = seed_words(seed, upper)
        number = torch.arange(first, stop, device=device) & _BITS
        x = (number * 0x9E3779B1 + low) & _BITS
        x = (x ^ (x >> 16)) * 0x7FEB352D & _BITS
        out.append(((x ^ (x >> 15)) + high & _BITS) * 0x846CA68B & _BITS)
        first = stop
    return torch.cat(out) if out else torch.empty(0, dtype=torch.int64, device=device)


def seed_words(seed: int, upper: int) -> tuple[int, int]:
    """Return the two halves of 64 bits that any change of the seed, or of the upper half of an element's number, changes."""
    z = (seed + (upper + 1) * 0x9E3779B97F4A7C15) & _LONG
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _LONG
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _LONG
    z ^= z >> 31
    return z & _BITS, z >> 32


class _Sums:
    """Sums or extremes of the positive and of the negative entries, the weights behind each, and the votes."""

    def __init__(self, like: Tensor, vote: Vote | None, combine: Combine) -> None:
        self.vote, self.combine = vote, combine
        self.plus, self.minus = torch.zeros_like(like), torch.zeros_like(like)
        self.weights = torch.zeros_like(like), torch.zeros_like(like)
        self.votes = torch.zeros_like(like)
        self.zero = torch.zeros((), dtype=like.dtype, device=like.device)

    def add(self, entries: Tensor, weight: float) -> None:
        if self.vote is None:
            self.plus += entries
            return
        positive, negative = entries > 0, entries < 0
        if self.combine == "max":
            self.plus = torch.where(entries > self.plus, entries, self.plus)
            self.minus = torch.where(entries < self.minus, entries, self.minus)
        else:
            self.plus += torch.where(positive, entries, self.zero)
            self.minus += torch.where(negative, entries, self.zero)
        self.weights[0].add_(positive.to(entries.dtype) * weight)
        self.weights[1].add_(negative.to(entries.dtype) * weight)
        self.votes += positive.to(entries.dtype) - negative.to(entries.dtype) if self.vote == "count" else entries

    def merged(self) -> Tensor:
        if self.vote is None:
            return self.plus
        counted = self.vote == "count" or self.combine == "max"
        up = (self.votes if counted else self.plus + self.minus) >= 0
        total = torch.where(up, self.plus, self.minus)
        if self.combine != "mean":
            return total
        weight = torch.where(up, *self.weights)
        return total / torch.where(weight > 0, weight, torch.ones_like(self.zero))


def _kept(delta: Tensor, term: Term, part: slice, begin: int) -> Tensor:
    keep = keep_mask(term.select, delta, begin + (part.start or 0), part)
    entries = delta * _rounded(term.weight * term.factor, delta.dtype)
    if isinstance(term.select, RankedChance) and term.select.inverse:
        entries = entries / probabilities(term.select, part).clamp(max=1.0).to(delta.dtype)
    return torch.where(keep, entries, torch.zeros((), dtype=delta.dtype, device=delta.device))


def _rounded(number: float, work: torch.dtype) -> float:
    return number if work == torch.float64 else float(np.float32(number))


def _work(out: Tensor, tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if torch.float64 in {out.dtype, *(tensor.dtype for tensor in tensors)} else torch.float32


def _parts(out: Tensor) -> list[slice]:
    return [slice(begin, min(begin + BLOCK, out.numel())) for begin in range(0, out.numel(), BLOCK)]
