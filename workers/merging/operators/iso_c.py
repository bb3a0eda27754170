"""Iso-C: the sum of the task vectors with all its singular values made equal."""

from __future__ import annotations

from torch import Tensor

from workers.merging.operator import Numbers, Parameter, Whole, operator
from workers.merging.spectral import (
    MatrixOptions,
    add_prepared,
    add_task_vectors,
    is_matrix,
    one_thread,
    sum_of_task_vectors,
    svd,
)


@operator(
    "iso_c",
    summary="Adds the task vectors and makes all singular values of the sum equal to their mean.",
    reference="Marczak et al., No task left behind, arXiv 2502.04959; as in fusion_bench",
    options=MatrixOptions,
    columns="scale",
    high=2.0,
    elementwise=True,
    idempotent=False,
)
def iso_c(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · σ̄ U Vᵀ, where U Σ Vᵀ = Σ τ_i and σ̄ is the mean of its singular values.

    Other tensors take the mean of the task vectors. Where the sum has not full rank, directions that it does not have
    are left out of the mean and of the result; the reference would raise arbitrary ones to σ̄. See `MergeFunction`.
    """
    (scale,) = parameter.coefficients
    if not is_matrix(parameter.info, parameter.options.embeddings):
        add_task_vectors(parameter, scale / len(parameter.models), out)
    elif scale == 0.0:
        out.copy_(parameter.ancestor)
    else:
        add_prepared(parameter, [parameter.facts.of_tensor("iso_c", _merged)["delta"]], [scale], out)


def _merged(whole: Whole) -> Numbers:
    with one_thread():
        parts = svd(sum_of_task_vectors(whole))
        return {"delta": parts.left @ parts.right * (parts.values.sum() / max(1, len(parts.values)))}
