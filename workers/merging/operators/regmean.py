"""RegMean: the linear layer whose outputs come closest to those of every expert on the expert's own inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from workers.merging.blocks import weighted_sum, work_dtype
from workers.merging.operator import Numbers, Options, Parameter, operator
from workers.merging.operators.fisher import weighted
from workers.merging.spectral import one_thread

_CONDITION = 1e-7
"""Smallest ratio of a Cholesky factor's pivots with which a solution has digits left."""


class RegMeanOptions(Options):
    """Options of `regmean` and `regmean_plusplus`."""

    off_diagonal: float = Field(
        default=0.95,
        ge=0,
        le=1,
        description="Factor of the Gram matrices' entries off the diagonal: 0.95 for CLIP, 0.9 for T5, 0.1 for DeBERTa.",
    )


@operator(
    "regmean",
    summary="Solves, for every linear layer, for the weights whose outputs are closest to each expert's on its inputs.",
    reference="Jin et al., Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849",
    options=RegMeanOptions,
    uses_base=False,
    needs="items",
)
def regmean(parameter: Parameter, out: Tensor) -> None:
    """Compute (Σ w_i G_i)⁻¹ Σ w_i G_i W_i with the Gram matrices G_i of a layer's inputs; see `MergeFunction`.

    What is not the weight of a linear layer (see `workers.merging.calibration_statistics.Question`) is averaged with the
    coefficients as weights, as is what no input determines. A candidate costs one solution of a linear system for each
    layer: cubic in its width.

    Raises:
        InfeasibleCandidate: a coefficient is negative, or all are 0.
    """
    used = weighted(parameter.coefficients)
    models = [parameter.models[number] for number, _ in used]
    if len(models) == 1:
        out.copy_(models[0])
        return
    measured = [parameter.facts.measured(number, "gram") for number, _ in used]
    combine(models, [weight for _, weight in used], measured, parameter.options.off_diagonal, out)


def combine(
    models: Sequence[Tensor], weights: Sequence[float], measured: Sequence[Numbers], off_diagonal: float, out: Tensor
) -> None:
    """Write RegMean's merge of one parameter into ``out``.

    Args:
        models: the inputs' tensors, complete.
        weights: positive, one for each.
        measured: what was answered to ``"gram"`` for each.
        off_diagonal: factor of the Gram matrices' entries off the diagonal.
        out: of the same shape.
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    if not all("gram" in found for found in measured):
        weighted_sum(out, models, shares)
        return
    axis = int(measured[0]["axis"])
    rows = [(tensor if axis == 1 else tensor.T).double() for tensor in models]
    with one_thread():  # else the last bits depend on how many there are
        mean = torch.zeros_like(rows[0])
        for tensor, share in zip(rows, shares, strict=True):
            mean.add_(tensor, alpha=share)
        merged = mean + _correction(rows, mean, shares, measured, off_diagonal)
    out.copy_((merged if axis == 1 else merged.T).to(work_dtype(out, *models)))


def _correction(
    rows: Sequence[Tensor], mean: Tensor, shares: Sequence[float], measured: Sequence[Numbers], off_diagonal: float
) -> Tensor:
    """What the solution has beside the mean of the weights: exactly 0 where these agree, small where they nearly do."""
    system = torch.zeros(mean.shape[1], mean.shape[1], dtype=mean.dtype, device=mean.device)
    right = torch.zeros_like(mean)
    for tensor, share, found in zip(rows, shares, measured, strict=True):
        gram = found["gram"].to(mean) * (share * off_diagonal)
        gram.diagonal().copy_(found["gram"].diagonal().to(mean) * share)
        system += gram
        right += (tensor - mean) @ gram
    factor, failed = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal()
    if not system.numel() or (int(failed) == 0 and float(pivots.min()) > _CONDITION * float(pivots.max())):
        solved: Tensor = torch.cholesky_solve(right.T, factor).T
    else:  # too few items, or inputs that are always 0: what they do not determine stays the mean
        solved = right @ torch.linalg.pinv(system, hermitian=True)
    return solved
