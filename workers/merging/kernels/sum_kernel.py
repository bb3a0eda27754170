"""The kernel of the linear family."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

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


@cache
def make_sum_kernel(source: torch.dtype, target: torch.dtype) -> Callable[..., None]:
    """Return ``kernel(out, models, weights, first, end)``.

    ``out`` and ``models`` are addresses, the elements from ``first`` up to ``end`` are written.
    """
    work, stored = work_type(source, target), STORED[target]
    store, write = storer(target), writer(target)
    add_one, add_two, add_three = _few(source, work)
    add_four, add_five = _many(source, work)
    zero = work(0)

    def kernel(out: Any, models: Any, weights: Any, first: Any, end: Any) -> None:
        total = aligned(np.empty(BLOCK + 16, work))
        ready = aligned(np.empty(BLOCK + 64, stored))
        for begin in range(first, end, BLOCK):
            count = min(BLOCK, end - begin)
            for i in range(count):
                total[i] = zero
            k = 0
            # Several models at once keep the memory busy; one by itself would not, so none is left over. Not elif below:
            # what LLVM makes of that is several times slower.
            while k + 4 <= models.size and k + 5 != models.size:
                add_four(total, models, weights, k, begin, count)
                k += 4
            if k + 5 <= models.size:
                add_five(total, models, weights, k, begin, count)
                k += 5
            if k + 3 <= models.size:
                add_three(total, models, weights, k, begin, count)
                k += 3
            if k + 2 <= models.size:
                add_two(total, models, weights, k, begin, count)
                k += 2
            if k < models.size:
                add_one(total, models, weights, k, begin, count)
            for i in range(count):
                ready[i] = store(total[i])
            write(out, begin, ready, count)
        drain()

    return compiled(kernel)


def _few(source: torch.dtype, work: type[Any]) -> list[Callable[..., Any]]:
    """Functions that add one, two and three models, from the k-th on, to a block of sums."""
    read, load = reader(source), loader(source, work)

    def add_one(total: Any, models: Any, weights: Any, k: Any, begin: Any, count: Any) -> None:
        a = read(models[k], begin, count)
        wa = weights[k]
        for i in range(count):
            total[i] = total[i] + wa * load(a[i])

    def add_two(total: Any, models: Any, weights: Any, k: Any, begin: Any, count: Any) -> None:
        a, b = read(models[k], begin, count), read(models[k + 1], begin, count)
        wa, wb = weights[k], weights[k + 1]
        for i in range(count):
            total[i] = (total[i] + wa * load(a[i])) + wb * load(b[i])

    def add_three(total: Any, models: Any, weights: Any, k: Any, begin: Any, count: Any) -> None:
        a, b, c = read(models[k], begin, count), read(models[k + 1], begin, count), read(models[k + 2], begin, count)
        wa, wb, wc = weights[k], weights[k + 1], weights[k + 2]
        for i in range(count):
            total[i] = ((total[i] + wa * load(a[i])) + wb * load(b[i])) + wc * load(c[i])

    return [compiled_inline(function) for function in (add_one, add_two, add_three)]


def _many(source: torch.dtype, work: type[Any]) -> list[Callable[..., Any]]:
    """Functions that add four and five models."""
    read, load = reader(source), loader(source, work)

    def add_four(total: Any, models: Any, weights: Any, k: Any, begin: Any, count: Any) -> None:
        a, b = read(models[k], begin, count), read(models[k + 1], begin, count)
        c, d = read(models[k + 2], begin, count), read(models[k + 3], begin, count)
        wa, wb, wc, wd = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        for i in range(count):
            total[i] = (((total[i] + wa * load(a[i])) + wb * load(b[i])) + wc * load(c[i])) + wd * load(d[i])

    def add_five(total: Any, models: Any, weights: Any, k: Any, begin: Any, count: Any) -> None:
        a, b = read(models[k], begin, count), read(models[k + 1], begin, count)
        c, d = read(models[k + 2], begin, count), read(models[k + 3], begin, count)
        e, we = read(models[k + 4], begin, count), weights[k + 4]
        wa, wb, wc, wd = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        for i in range(count):
            total[i] = (
                (((total[i] + wa * load(a[i])) + wb * load(b[i])) + wc * load(c[i])) + wd * load(d[i])
            ) + we * load(e[i])

    return [compiled_inline(function) for function in (add_four, add_five)]
