"""RegMean++: RegMean in which every layer is measured on what the merged layers before it pass on."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.merging.blocks import weighted_sum, work_dtype
from workers.merging.operator import Numbers, Parameter, operator
from workers.merging.operators.regmean import RegMeanOptions, combine


@operator(
    "regmean_plusplus",
    summary="Merges like RegMean, layer by layer, each measured on what the merged layers before it pass on.",
    reference="Nguyen et al., RegMean++, arXiv 2508.03121",
    options=RegMeanOptions,
    columns="scale",
    high=1.5,
    needs="items",
)
def regmean_plusplus(parameter: Parameter, out: Tensor) -> None:
    """Compute θ0 + λ (M − θ0), where M is the merge of all experts with equal weights; see `MergeFunction`.

    λ = 1 is the method's result. M is prepared once, with one pass of every expert's items for each layer: the experts'
    own layer stands behind the merged ones when its Gram matrix is measured, then the merged layer takes its place.
    What stands before the first layer and after the last is treated alike; fusion_bench, which knows CLIP alone,
    averages the former and leaves the latter as the base has it.
    """
    scale = parameter.coefficients[0]
    if scale == 0.0:
        out.copy_(parameter.ancestor)
        return
    off_diagonal = parameter.options.off_diagonal

    def merge(models: tuple[Tensor, ...], measured: tuple[Numbers, ...]) -> Tensor:
        merged = torch.empty(models[0].shape, dtype=work_dtype(*models), device=models[0].device)
        combine(models, [1.0] * len(models), measured, off_diagonal, merged)
        return merged

    merged = parameter.facts.merged_in_turn("gram", merge, {"off_diagonal": off_diagonal})
    weighted_sum(out, [parameter.ancestor, merged], [1.0 - scale, scale])
