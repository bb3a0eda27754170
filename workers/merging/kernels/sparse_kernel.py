"""The kernel of everything that keeps a part of each task vector and sums what is left, with or without a vote."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numpy as np
import torch

from workers.merging.kernels.lowlevel import (
    BLOCK,
    STORED,
    aligned,
    compiled,
    compiled_inline,
    drain,
    loader,
    reader,
    storer,
    work_type,
    writer,
)
from workers.merging.kernels.terms import Combine, Vote

Rule = Literal["limits", "chance", "ranked", "inverse"]
"""How entries are selected; `inverse` as `ranked`, with the entries divided by their probability."""

WEYL = np.uint32(0x9E3779B1)
STRIDE = BLOCK + 16  # between the sums in their array; multiples of a power of 2 compete for the same cache lines
_BASE, _PLUS, _MINUS, _FOR_PLUS, _FOR_MINUS, _VOTES = (STRIDE * row for row in range(6))


@cache
def make_sparse_kernel(
    source: torch.dtype, target: torch.dtype, rule: Rule, vote: Vote | None, combine: Combine
) -> Callable[..., None]:
    """Return ``kernel(out, base, models, factors, weights, …, scale, origin, first, end)``.

    Models are addresses; ``origin`` is the number in the parameter of the first element there, and the elements from
    ``first`` up to ``end`` are written. The upper halves of all their numbers are the same, and part of the seeds.
    """
    work, stored = work_type(source, target), STORED[target]
    read, load, store, write = reader(source), loader(source, work), storer(target), writer(target)
    add_one, add_two, add_three = _adders(source, work, rule, vote, combine)
    merged = _merged(work, vote, combine)
    zero = work(0)

    def kernel(
        out: Any, base: Any, models: Any, factors: Any, weights: Any, limits: Any, seeds: Any, tops: Any, chances: Any,
        ranks: Any, scale: Any, origin: Any, first: Any, end: Any,
    ) -> None:  # fmt: skip
        sums = aligned(np.empty(6 * STRIDE + 16, work))
        ready = aligned(np.empty(BLOCK + 64, stored))
        numbers = models, factors, weights, limits, seeds, tops, chances, ranks
        for begin in range(first, end, BLOCK):
            count = min(BLOCK, end - begin)
            place = begin, count, np.uint32(origin + begin)
            start = read(base, begin, count)
            for i in range(count):
                sums[i] = load(start[i])
                for row in range(1, 6):
                    sums[i + row * STRIDE] = zero
            k = 0
            while k + 3 <= models.size and k + 4 != models.size:
                add_three(sums, numbers, k, place)
                k += 3
            while k + 2 <= models.size:
                add_two(sums, numbers, k, place)
                k += 2
            if k < models.size:
                add_one(sums, numbers, k, place)
            for i in range(count):
                ready[i] = store(sums[i] + scale * merged(sums, i))
            write(out, begin, ready, count)
        drain()

    return compiled(kernel)


def _adders(
    source: torch.dtype, work: type[Any], rule: Rule, vote: Vote | None, combine: Combine
) -> list[Callable[..., Any]]:
    """Functions that add the entries of one, two and three models, from the k-th on, to the sums of a block."""
    model, load, kept, add = _model(source, rule), loader(source, work), _kept(work, rule), _add(work, vote, combine)

    def add_one(sums: Any, numbers: Any, k: Any, place: Any) -> None:
        a, rank_a, rule_a, weight_a = model(numbers, k, place)
        for i in range(place[1]):
            at = np.uint32(i) * WEYL
            add(sums, i, (kept(load(a[i]) - sums[i], rule_a, at, rank_a[i]),), (weight_a,))

    def add_two(sums: Any, numbers: Any, k: Any, place: Any) -> None:
        a, rank_a, rule_a, weight_a = model(numbers, k, place)
        b, rank_b, rule_b, weight_b = model(numbers, k + 1, place)
        for i in range(place[1]):
            at = np.uint32(i) * WEYL
            first = kept(load(a[i]) - sums[i], rule_a, at, rank_a[i])
            second = kept(load(b[i]) - sums[i], rule_b, at, rank_b[i])
            add(sums, i, (first, second), (weight_a, weight_b))

    def add_three(sums: Any, numbers: Any, k: Any, place: Any) -> None:
        a, rank_a, rule_a, weight_a = model(numbers, k, place)
        b, rank_b, rule_b, weight_b = model(numbers, k + 1, place)
        c, rank_c, rule_c, weight_c = model(numbers, k + 2, place)
        for i in range(place[1]):
            at = np.uint32(i) * WEYL
            first = kept(load(a[i]) - sums[i], rule_a, at, rank_a[i])
            second = kept(load(b[i]) - sums[i], rule_b, at, rank_b[i])
            third = kept(load(c[i]) - sums[i], rule_c, at, rank_c[i])
            add(sums, i, (first, second, third), (weight_a, weight_b, weight_c))

    return [compiled_inline(function) for function in (add_one, add_two, add_three)]


def _model(source: torch.dtype, rule: Rule) -> Callable[..., Any]:
    """A function that returns the k-th model's block, ranks there, numbers of its rule, and weight."""
    read, read_ranks, ranked = reader(source), reader(torch.float16), rule in ("ranked", "inverse")

    def model(numbers: Any, k: Any, place: Any) -> Any:
        models, factors, weights, limits, seeds, tops, chances, ranks = numbers
        begin, count, number = place
        block = read(models[k], begin, count)
        rank = read_ranks(ranks[k], begin, count) if ranked else block
        low = np.uint32(number * WEYL + seeds[k, 0])
        own = factors[k], limits[k, 0], limits[k, 1], low, seeds[k, 1], tops[k], chances[k, 0], chances[k, 1]
        return block, rank, own, weights[k]

    return compiled_inline(model)


def _lot(at: Any, low: Any, high: Any) -> Any:
    """See `workers.merging.kernels.portable.lots`; ``at`` and ``low`` are the element's and the block's share."""
    x = np.uint32(at + low)
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) + high)
    return np.uint32(x * np.uint32(0x846CA68B))


def _kept(work: type[Any], rule: Rule) -> Callable[..., Any]:
    """A function that returns an entry of a task vector times its factor where it is kept, else 0."""
    lot, zero, one, inverse = compiled_inline(_lot), work(0), np.float32(1), rule == "inverse"

    def within(delta: Any, numbers: Any, _at: Any, _rank: Any) -> Any:
        factor, low, high = numbers[0], numbers[1], numbers[2]
        size, entry = abs(delta), factor * delta
        return entry if (size >= low) & (size <= high) else zero

    def lucky(delta: Any, numbers: Any, at: Any, _rank: Any) -> Any:
        entry = numbers[0] * delta
        return entry if lot(at, numbers[3], numbers[4]) <= numbers[5] else zero

    def ranked(delta: Any, numbers: Any, at: Any, rank: Any) -> Any:
        drawn = np.float32(np.int32(lot(at, numbers[3], numbers[4]) >> np.uint32(8))) * np.float32(2.0**-24)
        probability = np.float32(np.int32(rank)) * numbers[7] + numbers[6]
        entry = numbers[0] * delta
        if inverse:
            entry = entry / work(min(probability, one))
        return entry if drawn < probability else zero

    return compiled_inline({"limits": within, "chance": lucky}.get(rule, ranked))


def _add(work: type[Any], vote: Vote | None, combine: Combine) -> Callable[..., Any]:
    """A function that adds entries to the sums at their place: positive, negative, the weights behind each, votes."""
    zero, one = work(0), work(1)
    voted, counted, mean, largest = vote is not None, vote == "count", combine == "mean", combine == "max"

    def total(sums: Any, i: Any, entries: Any, _weights: Any) -> None:
        plus = sums[i + _PLUS]
        for k in range(len(entries)):
            plus += entries[k]
        sums[i + _PLUS] = plus

    def split(sums: Any, i: Any, entries: Any, weights: Any) -> None:
        plus, minus = sums[i + _PLUS], sums[i + _MINUS]
        for_plus, for_minus, votes = sums[i + _FOR_PLUS], sums[i + _FOR_MINUS], sums[i + _VOTES]
        for k in range(len(entries)):
            entry, weight = entries[k], weights[k]
            if largest:
                plus = entry if entry > plus else plus
                minus = entry if entry < minus else minus
            else:
                plus += entry if entry > zero else zero
                minus += entry if entry < zero else zero
            for_plus += weight if entry > zero else zero
            for_minus += weight if entry < zero else zero
            votes += (one if entry > zero else zero) - (one if entry < zero else zero) if counted else entry
        sums[i + _PLUS], sums[i + _MINUS] = plus, minus
        if mean:  # what nobody asks for is never stored, and so not computed
            sums[i + _FOR_PLUS], sums[i + _FOR_MINUS] = for_plus, for_minus
        if counted or largest:
            sums[i + _VOTES] = votes

    return compiled_inline(split if voted else total)


def _merged(work: type[Any], vote: Vote | None, combine: Combine) -> Callable[..., Any]:
    """A function that returns the merged entry from its sums."""
    zero, one = work(0), work(1)
    voted, counted, mean, largest = vote is not None, vote == "count", combine == "mean", combine == "max"

    def merged(sums: Any, i: Any) -> Any:
        plus, minus = sums[i + _PLUS], sums[i + _MINUS]
        if not voted:
            return plus
        up = (sums[i + _VOTES] if counted or largest else plus + minus) >= zero
        total = plus if up else minus
        if mean:  # both are read before one is chosen: choosing where to read from would make a slow gather of it
            for_plus, for_minus = sums[i + _FOR_PLUS], sums[i + _FOR_MINUS]
            weight = for_plus if up else for_minus
            total = total / (weight if weight > zero else one)
        return total

    return compiled_inline(merged)
