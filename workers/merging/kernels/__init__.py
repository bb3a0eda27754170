"""Fused arithmetic: every model is read once, in its own type, and the result is written once.

`fused_sum` is the linear family; `merge_sparse` is "sparsify, elect, sum". On CPUs they run code that numba compiles for
the CPU at hand on first use (`compiled`), elsewhere torch (`portable`). Both do the same operations in the same order on
every element, none of them contracted or reassociated, so the bits depend neither on the machine nor on threads and
block sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workers.merging.kernels import portable
from workers.merging.kernels.terms import Combine, RankedChance, Term, Vote

CHUNK = 1 << 20
"""Elements that are converted at once where the models are not all of one type that compiled code reads."""
WORTH = 1 << 16
"""Elements from which on a tensor is worth the seconds of compiling; smaller ones use what is there already."""

_COMPILED = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_in_use: set[tuple[Any, ...]] = set()


def fused_sum(out: Tensor, tensors: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Write Σ weight · tensor into ``out``, summed in the order given.

    Args:
        out: contiguous.
        tensors: at least one; of the shape and on the device of ``out``, of any floating type.
        weights: one for each.
    """
    target, flat = out.view(-1), _flat(tensors)
    if not _use_compiled(target, flat, ("sum",)):
        portable.fused_sum(target, flat, weights)
        return
    from workers.merging.kernels import compiled  # takes numba, which those who never merge need not load

    _converted(target, flat, lambda out, tensors, _: compiled.fused_sum(out, tensors, weights))


def merge_sparse(
    out: Tensor,
    base: Tensor,
    terms: Sequence[Term],
    *,
    vote: Vote | None = None,
    combine: Combine = "sum",
    scale: float = 1.0,
    begin: int = 0,
) -> None:
    """Write base + scale · Σ weight · factor · kept(model − base) into ``out``.

    Args:
        out: contiguous; a stretch of a parameter, or all of it.
        base: of the same shape.
        terms: the models, with what is kept of their task vectors; all select in the same way.
        vote: whether only those entries are summed whose sign is the elected one: that of the sum of all weighted entries
            (``sum``) or of the sum of their signs (``count``); plus where that is 0.
        combine: with a vote, whether the entries that agree are summed, the sum is divided by Σ |weight| of theirs, or the
            largest of them is taken.
        scale: factor of the merged task vector.
        begin: number of the parameter's element that the stretch begins with.
    """
    target, flat = out.view(-1), _flat([base, *(term.tensor for term in terms)])
    if not _use_compiled(target, flat, (type(terms[0].select), vote, combine)):
        portable.merge_sparse(target, flat, terms, vote, combine, scale, begin)
        return
    from workers.merging.kernels import compiled

    def run(out: Tensor, tensors: Sequence[Tensor], start: int) -> None:
        compiled.merge_sparse(out, tensors, _from(terms, start), vote, combine, scale, begin + start)

    _converted(target, flat, run)


def _flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().reshape(-1) for tensor in tensors]


def _use_compiled(out: Tensor, tensors: Sequence[Tensor], kind: tuple[Any, ...]) -> bool:
    if out.device.type != "cpu":
        return False
    kind = (*kind, out.dtype, *sorted({str(tensor.dtype) for tensor in tensors}))
    if kind not in _in_use and out.numel() < WORTH:
        return False
    _in_use.add(kind)
    return True


def _from(terms: Sequence[Term], start: int) -> Sequence[Term]:
    """The terms of what is left of a stretch from element ``start`` on."""
    if start == 0 or not isinstance(terms[0].select, RankedChance):
        return terms
    return [
        replace(term, select=replace(term.select, ranks=term.select.ranks[start:]))
        for term in terms
        if isinstance(term.select, RankedChance)
    ]


def _converted(out: Tensor, tensors: Sequence[Tensor], run: Callable[[Tensor, Sequence[Tensor], int], None]) -> None:
    """Call ``run`` with tensors of one type that there is code for, converted chunk by chunk where they are not."""
    types = {tensor.dtype for tensor in tensors}
    if len(types) == 1 and types | {out.dtype} <= _COMPILED:
        run(out, tensors, 0)
        return
    work = torch.float64 if torch.float64 in types | {out.dtype} else torch.float32
    for start in range(0, out.numel(), CHUNK):
        goal = out[start : start + CHUNK]
        result = goal if goal.dtype in _COMPILED else torch.empty_like(goal, dtype=work)
        run(result, [tensor[start : start + CHUNK].to(work) for tensor in tensors], start)
        if result is not goal:
            goal.copy_(result)
