"""WIDEN: weigh every column of a task vector by how much its magnitude and its direction changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from workers.merging.blocks import dot, work_dtype
from workers.merging.grams import Lines, line_products, lines
from workers.merging.merged_vectors import add_merged_vector
from workers.merging.operator import Options, Parameter, Whole, operator


class WidenOptions(Options):
    """Options of `widen`."""

    above_average: float = Field(
        default=1.0,
        ge=0,
        le=100,
        description="Changes larger than the expert's average times this are important in themselves.",
    )
    calibration: float = Field(
        default=1.0, ge=0, le=10, description="Score of changes that are important in themselves."
    )


@operator(
    "widen",
    summary="Weighs the columns of the task vectors by how much their lengths and directions changed.",
    reference="Yu et al., Extend model merging from fine-tuned to pre-trained LLMs (WIDEN), arXiv 2408.03092",
    options=WidenOptions,
    columns="scale",
    high=2.0,
    elementwise=True,
)
def widen(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · Σ s_i τ_i with a score s_i for each expert and column; see `MergeFunction`.

    Within an expert, columns are ranked by the change of their norm, and of their direction (1 − cosine). Ranks become
    scores by a softmax over the experts; a rank above the expert's average counts ``calibration`` instead; the score of
    a column is the mean of its two. Embedding tables have a vector for each row, which is ranked like a column. Biases
    and norms are scored by |τ| itself, entry by entry. A column that was zero and is not has changed its direction
    completely, one that stayed zero not at all, where the authors' code divides by 0; tensors of more than two
    dimensions, which it refuses, have columns along the first. Average ranks are compared exactly, where it rounds.
    Scale 1 is the published method. The merged task vector is a fact of the models.
    """
    options: WidenOptions = parameter.options
    along: Lines = "row" if parameter.info.kind == "embeddings" else "column"

    def compute(whole: Whole) -> Tensor:
        return _merged(whole, along, options.above_average, options.calibration)

    add_merged_vector(parameter, out, "widen", compute, {**options.model_dump(), "along": along})


def _merged(whole: Whole, along: Lines, ratio: float, calibration: float) -> Tensor:
    base, models = whole
    assert base is not None  # noqa: S101 - it says it uses the base
    work = work_dtype(base, *models)
    total, start = torch.zeros(base.shape, dtype=work, device=base.device), base.to(work)
    if total.numel() == 0:
        return total
    if base.dim() < 2:
        deltas = [model.double() - base.double() for model in models]
        scores = _scores(deltas, [_mean(delta) * ratio for delta in deltas], calibration)
    else:
        scores = _line_scores(base, models, along, ratio, calibration)
    for model, score in zip(models, scores, strict=True):
        if base.dim() < 2:
            total.addcmul_(model.to(work) - start, score.to(work))
        else:
            delta = lines(model.to(work) - start, along) * score.to(work).unsqueeze(1)
            total += delta.reshape(base.shape) if along == "row" else delta.t().reshape(base.shape)
    return total


def _line_scores(
    base: Tensor, models: Sequence[Tensor], along: Lines, ratio: float, calibration: float
) -> list[Tensor]:
    """A score for each line of each model."""
    magnitudes, directions = [], []
    for model in models:
        delta = model.double() - base.double()
        products = line_products([base, delta], along)
        magnitude, direction = _changes(products[0, 0], products[0, 1], products[1, 1])
        magnitudes.append(_ranks(magnitude))
        directions.append(_ranks(direction))
    number = len(magnitudes[0])
    average = [ratio * (number - 1) / (2 * number)] * len(models)
    pairs = zip(_scores(magnitudes, average, calibration), _scores(directions, average, calibration), strict=True)
    return [0.5 * (first + second) for first, second in pairs]


def _changes(before: Tensor, along: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Changes of lines' norms and directions (1 − cosine), from ⟨a, a⟩, ⟨a, δ⟩ and ⟨δ, δ⟩: 0 where δ is, without noise."""
    norm, after = before.sqrt(), (before + 2.0 * along + change).clamp_(min=0.0).sqrt()
    longer = (2.0 * along + change) / torch.where(norm + after > 0, norm + after, 1.0)
    turned = 0.5 * (change - longer.square()).clamp_(min=0.0)
    comparable = norm * after > 0
    turned = torch.where(comparable, turned / torch.where(comparable, norm * after, 1.0), (change > 0).double())
    return longer.abs(), turned


def _ranks(changes: Tensor) -> Tensor:
    """Shares of the lines that changed less; ties stand in the order of their places."""
    places = changes.argsort(stable=True)
    ranks = torch.empty_like(changes)
    ranks[places] = torch.arange(len(changes), dtype=changes.dtype, device=changes.device) / len(changes)
    return ranks


def _scores(changes: Sequence[Tensor], limits: Sequence[float], calibration: float) -> list[Tensor]:
    """Softmax over the experts, except where an expert's own limit is exceeded."""
    shares = torch.stack([change.abs() for change in changes]).softmax(dim=0)
    return [
        torch.where(change.abs() > limit, calibration, share)
        for change, limit, share in zip(changes, limits, shares, strict=True)
    ]


def _mean(delta: Tensor) -> float:
    return dot(delta, delta.sign()) / delta.numel()
