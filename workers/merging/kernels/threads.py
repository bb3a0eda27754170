"""Splitting a range of elements over as many threads as torch may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch

ALIGNED = 1 << 12
"""Every part but the last has a multiple of so many elements, so that writes begin on a cache line."""
SMALLEST = 1 << 16
"""Elements from which on another thread is worth its start."""

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = Lock()
os.register_at_fork(after_in_child=_pools.clear)  # threads do not survive a fork


def spread(size: int, run: Callable[[int, int], None]) -> None:
    """Call ``run(begin, end)`` for parts that cover 0 … size; it must release the interpreter's lock to gain from it."""
    count = max(1, min(torch.get_num_threads(), size // SMALLEST))
    if count == 1:
        run(0, size)
        return
    step = -(-size // count // ALIGNED) * ALIGNED
    first, *others = [(begin, min(begin + step, size)) for begin in range(0, size, step)]
    pool = _pool(count - 1)
    futures = [pool.submit(run, *part) for part in others]
    try:
        run(*first)
    finally:
        for future in futures:
            future.result()


def _pool(count: int) -> ThreadPoolExecutor:
    with _lock:
        if count not in _pools:
            _pools[count] = ThreadPoolExecutor(count, thread_name_prefix="merge")
        return _pools[count]
