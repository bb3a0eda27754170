"""NearSwap: move each weight of the base towards the expert's, by no more than a given step."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from workers.merging.blocks import blockwise
from workers.merging.operator import Options, Parameter, operator

SMALLEST_DISTANCE = 1e-6


class NearSwapOptions(Options):
    """Options of `nearswap`."""

    t: float = Field(
        default=1e-4,
        gt=0,
        le=1,
        description="Largest step; weights that are closer together than this become the expert's.",
    )


@operator(
    "nearswap",
    summary="Swaps in the expert's weights where they are near the base's and moves the others by a fixed step.",
    reference="alchemonaut, QuartetAnemoi-70B-t0.0001; as in mergekit",
    options=NearSwapOptions,
    columns="scale",
    high=2.0,
    max_experts=1,
    elementwise=True,
    modifier=True,
)
def nearswap(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · min(1, t / |τ|) τ, where |τ| counts from 1e-6 on; see `MergeFunction`.

    Scale 1 is mergekit's method. For t ≥ 1e-6 the step is the task vector clamped to ±t.
    """
    (scale,) = parameter.coefficients
    if scale == 0.0:
        out.copy_(parameter.ancestor)
        return
    limit = parameter.options.t

    def combine(blocks: list[Tensor], result: Tensor) -> None:
        start, goal = (block.to(result.dtype) for block in blocks)
        share = (goal - start).abs_().clamp_(min=max(limit, SMALLEST_DISTANCE))  # so that near weights give exactly 1
        torch.lerp(start, goal, torch.div(limit, share, out=share).mul_(scale), out=result)

    blockwise(out, [parameter.ancestor, parameter.models[0]], combine)
