"""Consensus merging: keep of the multi-task vector only what several experts need (TALL masks)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from workers.merging.merged_vectors import add_merged_vector, merge_task_vectors
from workers.merging.operator import Options, Parameter, Whole, operator, varies


class ConsensusOptions(Options):
    """Options of `consensus`."""

    mask_lambda: float = varies(
        default=0.4,
        ge=0,
        le=10,
        description=(
            "λ: an expert needs an entry where |τ_i| > λ |Στ − τ_i|, so larger values mask more; tuned per expert between "
            "0.2 and 0.6 in the paper."
        ),
    )
    agreeing: int = Field(
        default=2,
        ge=0,
        le=1000,
        description="Number of experts that must need an entry for it to be kept; 0 keeps all, as task arithmetic.",
    )


@operator(
    "consensus",
    summary="Adds the sum of the task vectors where enough experts need it.",
    reference="Wang et al., Localizing task information (TALL masks), arXiv 2405.07813",
    options=ConsensusOptions,
    columns="scale",
    elementwise=True,
)
def consensus(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · Σ τ_i, where at least ``agreeing`` experts have |τ_i| > λ_i |Σ τ − τ_i|; see `MergeFunction`.

    The paper tunes the scale; for the plain sum it is about 0.3. The masked sum is a fact of the models.
    """
    limits, agreeing = parameter.values("mask_lambda"), parameter.options.agreeing

    def combine(deltas: list[Tensor]) -> Tensor:
        total = torch.zeros_like(deltas[0])
        for delta in deltas:
            total += delta
        needed = torch.zeros_like(total)
        for delta, limit in zip(deltas, limits, strict=True):
            needed += delta.abs() > (total - delta).abs_().mul_(limit)
        return total.mul_(needed >= agreeing)

    def compute(whole: Whole) -> Tensor:
        return merge_task_vectors(whole, combine)

    add_merged_vector(parameter, out, "consensus", compute, {"mask_lambda": limits, "agreeing": agreeing})
