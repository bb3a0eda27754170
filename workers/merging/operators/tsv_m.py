"""TSV-M: the leading singular vectors of every task, made orthogonal to those of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.merging.operator import Numbers, Parameter, Whole, operator
from workers.merging.spectral import (
    MatrixOptions,
    add_prepared,
    add_task_vectors,
    is_matrix,
    one_thread,
    polar,
    svd,
    task_vectors,
)


@operator(
    "tsv_m",
    summary="Keeps each task's leading singular vectors and makes those of different tasks orthogonal.",
    reference="Gargiulo et al., Task singular vectors, arXiv 2412.00081; as in fusion_bench",
    options=MatrixOptions,
    columns="scale",
    high=2.0,
    elementwise=True,
    idempotent=False,
)
def tsv_m(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · U⊥ Σ V⊥ᵀ; see `MergeFunction`.

    Each of N task vectors contributes its min(m, n) ∕ N leading singular triplets; U⊥ and V⊥ are the polar factors of
    all left and of all right singular vectors side by side. Other tensors, and matrices with fewer than N rows or
    columns (which the reference leaves at the base), take the mean of the task vectors. Task vectors of low rank
    contribute what they have, where the reference fills up with arbitrary vectors. The scale is the paper's α.
    """
    (scale,) = parameter.coefficients
    count = len(parameter.models)
    if not is_matrix(parameter.info, parameter.options.embeddings) or min(parameter.info.shape) < count:
        add_task_vectors(parameter, scale / count, out)
    elif scale == 0.0:
        out.copy_(parameter.ancestor)
    else:
        add_prepared(parameter, [parameter.facts.of_tensor("tsv_m", _merged)["delta"]], [scale], out)


def _merged(whole: Whole) -> Numbers:
    with one_thread():
        models = whole[1]
        share = min(models[0].shape) // len(models)
        parts = [svd(delta).leading(share) for delta in task_vectors(whole)]
        left = polar(torch.cat([part.left for part in parts], dim=1))
        right = polar(torch.cat([part.right for part in parts], dim=0))
        return {"delta": (left * torch.cat([part.values for part in parts])) @ right}
