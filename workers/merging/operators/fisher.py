"""Fisher merging: an average in which every weight counts as much as its expert's loss depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from optimizer.errors import InfeasibleCandidate
from workers.merging.blocks import blockwise, work_dtype
from workers.merging.operator import Options, Parameter, operator

_QUESTIONS = {"data": "fisher", "sampled": "fisher_sampled", "expected": "fisher_expected"}


class FisherOptions(Options):
    """Options of `fisher`."""

    labels: Literal["data", "sampled", "expected"] = Field(
        default="data",
        description=(
            "Labels of the items: `data` takes theirs (the empirical Fisher information), `sampled` draws one from each "
            "expert's own distribution, `expected` goes through all classes."
        ),
    )
    normalise: bool = Field(
        default=True,
        description="Divide each expert's Fisher information by its norm over the whole model, so that none dominates.",
    )
    floor: float = Field(
        default=1e-6, gt=0, le=1, description="Added to every weight's Fisher information, which may be 0."
    )


@operator(
    "fisher",
    summary="Averages the experts' weights, each weight by how much its expert's likelihood depends on it.",
    reference="Matena and Raffel, Merging models with Fisher-weighted averaging, arXiv 2111.09832",
    options=FisherOptions,
    uses_base=False,
    needs="gradients",
    elementwise=True,
)
def fisher(parameter: Parameter, out: Tensor) -> None:
    """Compute Σ w_i F_i θ_i / Σ w_i F_i with the diagonal Fisher information F_i plus the floor; see `MergeFunction`.

    With ``normalise`` w_i is the coefficient divided by (‖F_i‖ + floor), as fusion_bench has it. Its F is another: the
    square of a whole batch's summed gradient of Σ_classes √p log p, where this is the mean over the items of squares.

    Raises:
        InfeasibleCandidate: a coefficient is negative, or all are 0.
    """
    options = parameter.options
    used = weighted(parameter.coefficients)
    models = [parameter.models[number] for number, _ in used]
    if len(models) == 1:
        out.copy_(models[0])
        return
    stretch = slice(parameter.begin, parameter.begin + out.numel())
    information, weights = [], []
    for number, weight in used:
        found = parameter.facts.measured(number, _QUESTIONS[options.labels])
        information.append(found["fisher"].reshape(-1)[stretch])
        weights.append(weight / (float(found["norm"]) + options.floor) if options.normalise else weight)
    scale = max(weights)  # the ratio does not depend on it, but float32 has bounds
    shares = [weight / scale for weight in weights]
    count = len(models)

    def combine(blocks: list[Tensor], result: Tensor) -> None:
        total = torch.zeros_like(result)
        result.zero_()
        for block, known, share in zip(blocks[:count], blocks[count:], shares, strict=True):
            part = known.to(result.dtype).add(options.floor).mul_(share)
            total.add_(part)
            result.addcmul_(part, block.to(result.dtype))
        result.div_(total)

    blockwise(out, [*models, *information], combine, work_dtype(out, *models))


def weighted(coefficients: Sequence[float]) -> list[tuple[int, float]]:
    """Return number and weight of the inputs that count.

    Raises:
        InfeasibleCandidate: a weight is negative, or none is positive.
    """
    if min(coefficients) < 0.0 or max(coefficients) == 0.0:
        raise InfeasibleCandidate("models are averaged with weights of which none is negative and one is positive")
    return [(number, weight) for number, weight in enumerate(coefficients) if weight > 0.0]
