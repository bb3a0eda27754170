"""The kernels for CPUs, compiled on first use for the types and the rule that a merge needs, run by several threads.

A kernel walks over blocks of a few hundred elements. The sums of a block stay in the first-level cache while the models
are added to them, a few at a time; every loop is one that LLVM turns into vector code. Finished blocks are written past
the caches, as a copy does. Nothing is contracted or reassociated (no fast-math), so every CPU computes the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from workers.merging.kernels.lowlevel import work_type
from workers.merging.kernels.portable import seed_words
from workers.merging.kernels.sparse_kernel import Rule, make_sparse_kernel
from workers.merging.kernels.sum_kernel import make_sum_kernel
from workers.merging.kernels.terms import Chance, Combine, Limits, RankedChance, Term, Vote
from workers.merging.kernels.threads import spread


def fused_sum(out: Tensor, tensors: Sequence[Tensor], weights: Sequence[float]) -> None:
    """See `workers.merging.kernels.fused_sum`; all flat, the tensors of one type."""
    kernel = make_sum_kernel(tensors[0].dtype, out.dtype)
    addresses = _addresses(tensors)
    numbers = np.array(weights, dtype=work_type(tensors[0].dtype, out.dtype))
    target = out.data_ptr()
    spread(out.numel(), lambda begin, end: kernel(target, addresses, numbers, begin, end))


def merge_sparse(
    out: Tensor,
    tensors: Sequence[Tensor],
    terms: Sequence[Term],
    vote: Vote | None,
    combine: Combine,
    scale: float,
    begin: int,
) -> None:
    """See `workers.merging.kernels.merge_sparse`; ``tensors`` are the base's and the models', flat, of one type."""
    kernel = make_sparse_kernel(tensors[0].dtype, out.dtype, _rule(terms[0].select), vote, combine)
    work = work_type(tensors[0].dtype, out.dtype)
    base, target, factor = np.uint64(tensors[0].data_ptr()), out.data_ptr(), work(scale)
    addresses = _addresses(tensors[1:])
    factors = np.array([term.weight * term.factor for term in terms], dtype=work)
    weights = np.abs(np.array([term.weight for term in terms], dtype=work))
    first, size = 0, out.numel()
    while first < size:  # a tensor of more than 2**32 elements has several parts with seeds of their own
        stop = min(size, (((begin + first) >> 32) + 1 << 32) - begin)
        selection = _selection(terms, (begin + first) >> 32, work)

        def run(start: int, end: int, first: int = first, selection: tuple[NDArray[Any], ...] = selection) -> None:
            kernel(target, base, addresses, factors, weights, *selection, factor, begin, first + start, first + end)

        spread(stop - first, run)
        first = stop


def _rule(select: Limits | Chance | RankedChance) -> Rule:
    if isinstance(select, RankedChance):
        return "inverse" if select.inverse else "ranked"
    return "limits" if isinstance(select, Limits) else "chance"


def _selection(terms: Sequence[Term], upper: int, work: type[Any]) -> tuple[NDArray[Any], ...]:
    """Limits (low, high), seeds (two words), highest lots, chances (lowest, step) and addresses of the ranks."""
    count = len(terms)
    limits, seeds = np.zeros((count, 2), dtype=work), np.zeros((count, 2), dtype=np.uint32)
    tops, chances = np.zeros(count, dtype=np.uint32), np.zeros((count, 2), dtype=np.float32)
    ranks = np.zeros(count, dtype=np.uint64)
    for number, term in enumerate(terms):
        select = term.select
        if isinstance(select, Limits):
            limits[number] = select.low, select.high
            continue
        seeds[number] = seed_words(select.seed, upper)
        if isinstance(select, Chance):
            tops[number] = select.top
        else:
            chances[number] = select.lowest, select.step
            ranks[number] = select.ranks.data_ptr()
    return limits, seeds, tops, chances, ranks


def _addresses(tensors: Sequence[Tensor]) -> NDArray[np.uint64]:
    return np.array([tensor.data_ptr() for tensor in tensors], dtype=np.uint64)
