"""Model Stock: the experts' average, drawn towards the base as far as their task vectors disagree."""

from __future__ import annotations

from itertools import combinations
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from workers.merging.blocks import weighted_sum
from workers.merging.grams import inner_products, line_products, line_sum
from workers.merging.operator import Numbers, Options, Parameter, Whole, operator

SMALLEST_PRODUCT = 1e-6
SMALLEST_DENOMINATOR = 1e-6
EPS = 1e-8


class ModelStockOptions(Options):
    """Options of `model_stock`."""

    filter_wise: bool = Field(
        default=False, description="Take an angle for each row (last dimension) instead of one for the whole tensor."
    )
    average: Literal["cosine", "angle"] = Field(
        default="cosine",
        description=(
            "What is averaged over the pairs of more than two experts: the `cosine` as mergekit does, or the `angle` as "
            "fusion_bench does."
        ),
    )


@operator(
    "model_stock",
    summary="Averages the experts and moves towards the base as far as the angles between their task vectors say.",
    reference="Jang et al., Model Stock, arXiv 2403.19522",
    options=ModelStockOptions,
    columns="scale",
    high=2.0,
    min_experts=2,
    elementwise=True,
)
def model_stock(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · r (θ̄ − base), r = N cos α / (1 + (N−1) cos α), α between task vectors; see `MergeFunction`.

    Scale 1 is the published method. The ratio r is a fact of the models: a candidate costs one weighted sum. It is 0
    where the denominator vanishes and for task vectors that are zero. mergekit lets norms count from a product of 1e-6
    on (so the ratio is smaller for tiny task vectors), fusion_bench adds 1e-8 to it; each form does as its model.
    """
    (scale,) = parameter.coefficients
    if scale == 0.0 or out.numel() == 0:
        out.copy_(parameter.ancestor)
        return
    options: ModelStockOptions = parameter.options

    def compute(whole: Whole) -> Numbers:
        base, models = whole
        products = line_products(models, "row", base) if options.filter_wise else inner_products(whole, "base")
        return {"ratio": _ratio(products, options.average)}

    settings = {"filter_wise": options.filter_wise, "average": options.average}
    ratio = scale * parameter.facts.of_tensor("model_stock_ratio", compute, settings=settings)["ratio"]
    count = len(parameter.models)
    tensors = [parameter.ancestor, *parameter.models]
    if options.filter_wise:
        line_sum(parameter, out, tensors, [1.0 - ratio, *[ratio / count] * count], "row")
    else:
        weighted_sum(out, tensors, [1.0 - float(ratio), *[float(ratio) / count] * count])


def _ratio(products: Tensor, average: str) -> Tensor:
    """The ratio from the task vectors' inner products, of shape (experts, experts) or (experts, experts, lines)."""
    count = len(products)
    norms = [products[number, number].sqrt() for number in range(count)]
    if average == "cosine":
        cosines = [
            (products[i, j] / (norms[i] * norms[j]).clamp(min=SMALLEST_PRODUCT)).clamp(-1.0, 1.0)
            for i, j in combinations(range(count), 2)
        ]
        cosine = torch.stack(cosines).mean(dim=0)
        denominator = 1.0 + (count - 1) * cosine
    else:
        cosines = [
            (products[i, j] / (norms[i] * norms[j] + EPS)).clamp(-1.0, 1.0) for i, j in combinations(range(count), 2)
        ]
        cosine = torch.stack([value.acos() for value in cosines]).mean(dim=0).cos()
        denominator = 1.0 + (count - 1) * cosine + EPS
    vanishes = denominator.abs() < SMALLEST_DENOMINATOR
    return torch.where(vanishes, 0.0, count * cosine / torch.where(vanishes, 1.0, denominator))
