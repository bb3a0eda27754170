"""TIES: trim, elect sign, disjoint merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from workers.merging.blocks import blockwise, work_dtype
from workers.merging.operator import Options, operator


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
def ties(
    base: Tensor | None, inputs: Sequence[Tensor], coefficients: Sequence[float], options: TiesOptions, out: Tensor
) -> None:
    """Compute base + scale · Σ_{agreeing} w_i τ_i [/ Σ_{agreeing} |w_i|] over trimmed task vectors; see `MergeFunction`.

    The elected sign is that of Σ w_i τ_i (plus where it is 0). Entries as large as the smallest kept one are all kept,
    where mergekit breaks such ties by position. For coefficients ≥ 0, `mean` is mergekit's normalised merge; for
    others mergekit divides by the signed sum, which can vanish. For equal coefficients it is the paper's disjoint mean.
    """
    assert base is not None  # noqa: S101 - the engine gives it, as the operator says it uses it
    used = [(tensor, number) for tensor, number in zip(inputs, coefficients, strict=True) if number != 0.0]
    if not used:
        out.copy_(base)
        return
    work = work_dtype(out, base, *inputs)
    limits = [_smallest_kept(tensor, base, options.density, work) for tensor, _ in used]

    def combine(blocks: list[Tensor], result: Tensor) -> None:
        start = blocks[0].to(result.dtype)
        sides = _Sides(result)
        for block, limit, (_, weight) in zip(blocks[1:], limits, used, strict=True):
            sides.add(block.to(result.dtype) - start, limit, weight)
        torch.add(start, sides.merged(options.normalise == "mean"), alpha=options.scale, out=result)

    blockwise(out, [base, *(tensor for tensor, _ in used)], combine, work)


class _Sides:
    """Sums of the positive and of the negative weighted entries, and the coefficients behind each."""

    def __init__(self, like: Tensor) -> None:
        self.sums = torch.zeros_like(like), torch.zeros_like(like)
        self.weights = torch.zeros_like(like), torch.zeros_like(like)

    def add(self, delta: Tensor, limit: float, weight: float) -> None:
        if limit > 0.0:
            delta.mul_(delta.abs() >= limit)
        delta.mul_(weight)
        self.sums[0].add_(delta.clamp(min=0.0))
        self.sums[1].add_(delta.clamp(max=0.0))
        self.weights[0].add_(delta > 0.0, alpha=abs(weight))
        self.weights[1].add_(delta < 0.0, alpha=abs(weight))

    def merged(self, mean: bool) -> Tensor:
        plus = self.sums[0] + self.sums[1] >= 0.0
        merged = torch.where(plus, *self.sums)
        if mean:
            weights = torch.where(plus, *self.weights)
            merged.div_(weights.masked_fill_(weights == 0.0, 1.0))
        return merged


def _smallest_kept(tensor: Tensor, base: Tensor, density: float, work: torch.dtype) -> float:
    """The magnitude of the smallest entry of the task vector that is kept; at least one entry is."""
    count = tensor.numel()
    kept = max(1, int(density * count))
    if kept >= count:
        return 0.0
    size = torch.sub(tensor.to(work), base.to(work)).abs_().view(-1)
    if size.device.type == "cpu":  # numpy selects four times as fast as torch here
        values = size.numpy()
        values.partition(count - kept)
        return float(values[count - kept])
    return float(size.kthvalue(count - kept + 1).values)
