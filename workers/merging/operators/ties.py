"""TIES: trim, elect sign, disjoint merge."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import hardshrink
from torch.utils.weak import WeakIdKeyDictionary

from workers.merging.blocks import blockwise, work_dtype
from workers.merging.operator import Options, Parameter, operator

_Answer = tuple["weakref.ref[Tensor]", tuple[int, torch.dtype, int, int], float]
_REMEMBERED: MutableMapping[Tensor, _Answer] = WeakIdKeyDictionary()


class TiesOptions(Options):
    """Options of `ties`."""

    density: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="Share of each task vector that is kept, per tensor, largest magnitudes first.",
    )
    scale: float = Field(default=1.0, ge=-10, le=10, description="λ, the factor of the merged task vector.")
    normalise: Literal["mean", "sum"] = Field(
        default="mean",
        description=(
            "`mean` divides by the coefficients of the experts that agree with the elected sign; `sum` does not, and is "
            "used with a scale of about 0.3."
        ),
    )


@operator(
    "ties",
    summary="Keeps the largest entries of each task vector, elects a sign per weight, and merges the experts that agree.",
    reference="Yadav et al., TIES-Merging, arXiv 2306.01708",
    options=TiesOptions,
)
def ties(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · Σ_{agreeing} w_i τ_i [/ Σ_{agreeing} |w_i|] over trimmed task vectors; see `MergeFunction`.

    The elected sign is that of Σ w_i τ_i (plus where it is 0). Entries as large as the smallest kept one are all kept,
    where mergekit breaks such ties by position. For coefficients ≥ 0, `mean` is mergekit's normalised merge; for
    others mergekit divides by the signed sum, which can vanish. For equal coefficients it is the paper's disjoint mean.
    """
    base, inputs, options = parameter.ancestor, parameter.models, parameter.options
    used = [(tensor, number) for tensor, number in zip(inputs, parameter.coefficients, strict=True) if number != 0.0]
    if not used:
        out.copy_(base)
        return
    work = work_dtype(out, base, *inputs)
    limits = [_smallest_kept(tensor, base, options.density, work) for tensor, _ in used]

    def combine(blocks: list[Tensor], result: Tensor) -> None:
        start = blocks[0].to(result.dtype)
        sides = _Sides(result, [weight for _, weight in used])
        for block, limit, (_, weight) in zip(blocks[1:], limits, used, strict=True):
            sides.add(block.to(result.dtype) - start, limit, weight)
        torch.add(start, sides.merged(options.normalise == "mean"), alpha=options.scale, out=result)

    blockwise(out, [base, *(tensor for tensor, _ in used)], combine, work)


class _Sides:
    """Sums of the positive and of the negative weighted entries, and the coefficients behind each.

    Written with signs and clamps: comparisons and selections on the CPU take up to forty times as long.
    """

    def __init__(self, like: Tensor, weights: Sequence[float]) -> None:
        self.sums = torch.zeros_like(like), torch.zeros_like(like)
        self.weights = torch.zeros_like(like), torch.zeros_like(like)
        self.smallest = min(abs(weight) for weight in weights)

    def add(self, delta: Tensor, limit: float, weight: float) -> None:
        if limit > 0.0:  # hardshrink drops what is as large as its argument; the limit itself is to be kept
            below = torch.nextafter(torch.tensor(limit, dtype=delta.dtype), torch.zeros((), dtype=delta.dtype))
            delta = hardshrink(delta, float(below))
        sign = delta.sign()
        plus, minus = (0, 1) if weight > 0.0 else (1, 0)
        self.sums[plus].add_(delta.clamp(min=0.0), alpha=weight)
        self.sums[minus].add_(delta.clamp(max=0.0), alpha=weight)
        self.weights[plus].add_(sign.clamp(min=0.0), alpha=abs(weight))
        self.weights[minus].add_(sign.clamp(max=0.0), alpha=-abs(weight))

    def merged(self, mean: bool) -> Tensor:
        positive = (self.sums[0] + self.sums[1]).sign_().add_(1.0).clamp_(max=1.0)
        merged = _choose(positive, self.sums)
        if mean:  # where nobody agrees the sum is 0, whatever it is divided by
            merged.div_(_choose(positive, self.weights).clamp_(min=self.smallest))
        return merged


def _choose(first: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
    """The first of the pair where ``first`` is 1, the second where it is 0."""
    return pair[0].mul_(first).add_(pair[1].mul_(1.0 - first))


def _smallest_kept(tensor: Tensor, base: Tensor, density: float, work: torch.dtype) -> float:
    """The magnitude of the smallest entry of the task vector that is kept; at least one entry is.

    Most of the work of a merge, and the same for every candidate of a search with a fixed density: the last answer is
    remembered for as long as both tensors live unchanged.
    """
    kept = max(1, int(density * tensor.numel()))
    if kept >= tensor.numel():
        return 0.0
    if tensor.is_inference() or base.is_inference():  # they do not tell whether they were changed
        return _select(tensor, base, kept, work)
    question = (kept, work, tensor._version, base._version)
    known = _REMEMBERED.get(tensor)
    if known is None or known[0]() is not base or known[1] != question:
        known = _REMEMBERED[tensor] = (weakref.ref(base), question, _select(tensor, base, kept, work))
    return known[2]


def _select(tensor: Tensor, base: Tensor, kept: int, work: torch.dtype) -> float:
    """The magnitude that is the ``kept``-th largest of the task vector."""
    size = torch.sub(tensor.to(work), base.to(work)).abs_().view(-1)
    rank = size.numel() - kept
    if size.device.type == "cpu":  # numpy selects four times as fast as torch here
        values = size.numpy()
        values.partition(rank)
        return float(values[rank])
    return float(size.kthvalue(rank + 1).values)
