"""SCE: select the entries that vary most between experts, calculate weights from their energy, erase minority signs."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from workers.merging.blocks import dot
from workers.merging.merged_vectors import add_merged_vector, merge_task_vectors
from workers.merging.operator import Options, Parameter, Whole, operator

SMALLEST_SUM = 1e-6


class SceOptions(Options):
    """Options of `sce`."""

    select_topk: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share kept of the entries that vary between the experts, largest variance first; per tensor.",
    )
    uniform_below: float = Field(
        default=1e-6,
        ge=0,
        le=1,
        description=(
            "Experts weigh the same where their mean squared entries sum to less: 1e-6 as in mergekit, which the task "
            "vectors of a short fine-tuning stay below; 0 weighs them by energy always."
        ),
    )


@operator(
    "sce",
    summary="Keeps what varies between the experts, weighs them by energy per tensor, and drops minority signs.",
    reference="Wan et al., FuseChat, arXiv 2408.07990",
    options=SceOptions,
    columns="scale",
    high=2.0,
    elementwise=True,
)
def sce(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · Σ_{agreeing} w_i τ_i / Σ_{agreeing} w_i, w_i ∝ mean τ_i² per tensor; see `MergeFunction`.

    Scale 1 is the published method. Experts agree whose entry has the sign of the sum (plus where it is 0). Entries as
    varied as the least varied kept one are all kept, where mergekit breaks such ties by position. Sums of weights count
    from 1e-6 on, as in mergekit. The merged task vector is a fact of the models.
    """
    options: SceOptions = parameter.options

    def compute(whole: Whole) -> Tensor:
        return _merged(whole, options.select_topk, options.uniform_below)

    add_merged_vector(parameter, out, "sce", compute, options.model_dump())


def _merged(whole: Whole, share: float, uniform_below: float) -> Tensor:
    variance = merge_task_vectors(whole, _variance) if share < 1.0 else None
    limit = _least_variance(variance.view(-1), share) if variance is not None else 0.0
    if limit is None or whole[1][0].numel() == 0:
        return merge_task_vectors(whole, lambda deltas: torch.zeros_like(deltas[0]))
    selected = variance >= limit if variance is not None else None
    energies = [_energy((whole[0], (model,)), selected) for model in whole[1]]
    total = sum(energies)
    uniform = total < uniform_below or total == 0.0
    weights = [1.0 / len(energies) if uniform else energy / total for energy in energies]

    def combine(deltas: list[Tensor]) -> Tensor:
        _select(deltas, limit)
        majority = (torch.stack(deltas).sum(dim=0) >= 0).to(deltas[0].dtype) * 2 - 1
        merged, shares = torch.zeros_like(majority), torch.zeros_like(majority)
        for delta, weight in zip(deltas, weights, strict=True):
            agrees = (delta.sign() == majority).to(delta.dtype).mul_(weight)
            merged.addcmul_(delta, agrees)
            shares += agrees
        return merged.div_(shares.clamp_(min=SMALLEST_SUM))

    return merge_task_vectors(whole, combine)


def _select(deltas: list[Tensor], limit: float) -> None:
    """Erase the entries whose variance is below the limit."""
    if limit > 0.0:
        kept = _variance(deltas) >= limit
        for delta in deltas:
            delta.mul_(kept)


def _variance(deltas: list[Tensor]) -> Tensor:
    mean = torch.zeros_like(deltas[0])
    for delta in deltas:
        mean += delta
    mean /= len(deltas)
    variance = torch.zeros_like(mean)
    for delta in deltas:
        variance += (delta - mean).square_()
    return variance.div_(len(deltas))


def _least_variance(variance: Tensor, share: float) -> float | None:
    """The smallest variance that is kept, or None where nothing is."""
    kept = int(int(variance.count_nonzero()) * share)
    return float(variance.kthvalue(variance.numel() - kept + 1).values) if kept else None


def _energy(alone: Whole, selected: Tensor | None) -> float:
    """The mean square of a single expert's selected entries."""
    delta = merge_task_vectors(alone, lambda deltas: deltas[0])
    if selected is not None:
        delta.mul_(selected)
    return dot(delta, delta) / delta.numel()
