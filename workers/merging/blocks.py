"""Tensor arithmetic at the speed of memory, with results that depend on neither threads nor block sizes.

Large tensors are combined in blocks that stay in the cache; every element is computed in float32 (float64 where any
tensor has it) and rounded to the result's type once. Sums over a whole tensor are taken over rows of a fixed length
and then added exactly, so that the number of threads cannot change them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.merging.kernels import fused_sum

BLOCK = 1 << 20  # elements; half or twice as many measure slower on CPUs
BLOCK_GPU = 1 << 26  # on a GPU starting a kernel costs as much as 10 MB of memory traffic
_ROW = 4096


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the type arithmetic on ``tensors`` is done in."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def blockwise(
    out: Tensor,
    tensors: Sequence[Tensor],
    combine: Callable[[list[Tensor], Tensor], None],
    work: torch.dtype | None = None,
) -> None:
    """Fill ``out`` block by block.

    Args:
        out: contiguous.
        tensors: of the same shape, of any floating type.
        combine: gets a block of each tensor (flat; not to be written to) and a block of the work type that it fills.
        work: type of the arithmetic, by default the `work_dtype` of ``out`` and ``tensors``.
    """
    work = work or work_dtype(out, *tensors)
    target = out.view(-1)
    flat = [tensor.reshape(-1) for tensor in tensors]
    size = BLOCK if out.device.type == "cpu" else BLOCK_GPU
    for begin in range(0, target.numel(), size):
        part = slice(begin, begin + size)
        goal = target[part]
        result = goal if goal.dtype == work else torch.empty_like(goal, dtype=work)
        combine([tensor[part] for tensor in flat], result)
        if result is not goal:
            goal.copy_(result)


def weighted_sum(out: Tensor, tensors: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Write Σ weight · tensor into ``out``. A single tensor of weight 1 is copied bit for bit; weights of 0 are skipped."""
    terms = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight != 0.0]
    if not terms:
        out.zero_()
        return
    if len(terms) == 1 and terms[0][1] == 1.0:
        out.copy_(terms[0][0])
        return

    fused_sum(out, [tensor for tensor, _ in terms], [weight for _, weight in terms])


def dot(left: Tensor, right: Tensor) -> float:
    """Return Σ left · right in float64, the same for any number of threads."""
    a, b = left.reshape(-1), right.reshape(-1)
    whole = a.numel() // _ROW * _ROW
    parts: list[float] = []
    for begin in range(0, whole, BLOCK):
        part = slice(begin, min(begin + BLOCK, whole))
        parts += (a[part].double() * b[part].double()).view(-1, _ROW).sum(dim=1).tolist()
    parts += (a[whole:].double() * b[whole:].double()).tolist()
    return math.fsum(parts)
