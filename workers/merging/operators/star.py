"""STAR: every task vector reduced to its leading singular values, which are scaled up for those that were cut."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.merging.blocks import weighted_sum
from workers.merging.operator import Numbers, Parameter, Whole, operator, varies
from workers.merging.spectral import MatrixOptions, add_prepared, is_matrix, one_thread, svd, task_vectors


class StarOptions(MatrixOptions):
    """Options of `star`."""

    eta: float = varies(
        0.4, gt=0, le=1, description="Share of the sum of a task vector's singular values that the kept ones reach."
    )


@operator(
    "star",
    summary="Keeps the leading singular values of each task vector, scales them up to the full sum, and adds up.",
    reference="Lee et al., STAR: spectral truncation and rescale, arXiv 2502.10339; as in IBM/STAR",
    options=StarOptions,
    elementwise=True,
    idempotent=False,
    modifier=True,
)
def star(parameter: Parameter, out: Tensor) -> None:
    """Compute base + Σ λ_i · (‖τ_i‖_* / ‖τ_i^(r)‖_*) · τ_i^(r); see `MergeFunction`.

    τ_i^(r) has the fewest leading singular values that reach ``eta`` of the nuclear norm ‖τ_i‖_*. Each expert is
    prepared by itself and then merged linearly, so that the operator serves as a modifier of one expert too; the
    authors' merge has λ_i = 1/N. Tensors other than matrices keep their task vectors.
    """
    models, weights = parameter.models, parameter.coefficients
    if not is_matrix(parameter.info, parameter.options.embeddings):
        own = math.fsum([1.0, *(-weight for weight in weights)])
        weighted_sum(out, [parameter.ancestor, *models], [own, *weights])
        return
    used = [number for number, weight in enumerate(weights) if weight != 0.0]
    shares = parameter.values("eta")
    prepared = [_prepared(parameter, number, shares[number]) for number in used]
    add_prepared(parameter, prepared, [weights[number] for number in used], out)


def _prepared(parameter: Parameter, number: int, eta: float) -> Tensor:
    found = parameter.facts.of_tensor("star", lambda whole: _reduced(whole, eta), of=(number,), settings={"eta": eta})
    return found["delta"]


def _reduced(whole: Whole, eta: float) -> Numbers:
    with one_thread():
        (delta,) = task_vectors(whole)
        parts = svd(delta)
        total = parts.values.sum()
        rank = int(torch.searchsorted(parts.values.cumsum(dim=0), eta * total)) + 1
        kept = parts.leading(rank)
        return {"delta": kept.matrix() * (total / kept.values.sum() if len(kept.values) else 0.0)}
