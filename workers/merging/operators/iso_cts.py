"""Iso-CTS: Iso-C whose weakest common directions make room for directions of the tasks' own."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from workers.merging.operator import Numbers, Parameter, Whole, operator
from workers.merging.spectral import (
    MatrixOptions,
    add_prepared,
    add_task_vectors,
    is_matrix,
    one_thread,
    polar,
    sum_of_task_vectors,
    svd,
    task_vectors,
)


class IsoCtsOptions(MatrixOptions):
    """Options of `iso_cts`."""

    common_fraction: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="Share of the directions that are those of the sum; the tasks' own fill the rest, each as many.",
    )


@operator(
    "iso_cts",
    summary="Adds directions of each task's own to the common ones, and makes all singular values equal.",
    reference="Marczak et al., No task left behind, arXiv 2502.04959; as in fusion_bench",
    options=IsoCtsOptions,
    columns="scale",
    high=2.0,
    elementwise=True,
    idempotent=False,
)
def iso_cts(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · σ̄ U⊥ V⊥ᵀ; see `MergeFunction`.

    The common directions are the leading ones of Σ τ_i. A task's own are the leading ones of its task vector after the
    projection onto the common left singular vectors is taken away. U⊥ and V⊥ are the polar factors of all of them side
    by side, σ̄ is the mean of their singular values. Each task has round((1 − common_fraction) min(m, n) ∕ N)
    directions, the common ones take what is left. Other tensors take the mean of the task vectors; for matrices of low
    rank see `iso_c`.
    """
    (scale,) = parameter.coefficients
    options: IsoCtsOptions = parameter.options
    if not is_matrix(parameter.info, options.embeddings):
        add_task_vectors(parameter, scale / len(parameter.models), out)
    elif scale == 0.0:
        out.copy_(parameter.ancestor)
    else:
        fraction = options.common_fraction
        found = parameter.facts.of_tensor(
            "iso_cts", lambda whole: _merged(whole, fraction), settings={"common_fraction": fraction}
        )
        add_prepared(parameter, [found["delta"]], [scale], out)


def _merged(whole: Whole, fraction: float) -> Numbers:
    with one_thread():
        count, size = len(whole[1]), min(whole[1][0].shape)
        own = min(size // count, round((size - int(size * fraction)) / count))
        common = svd(sum_of_task_vectors(whole)).leading(size - own * count)
        left = common.left
        parts = []
        if own:
            parts = [svd(delta - left @ (left.T @ delta), part_of=delta).leading(own) for delta in task_vectors(whole)]
        parts.append(common)
        values = torch.cat([part.values for part in parts])
        merged = polar(torch.cat([part.left for part in parts], dim=1)) @ polar(
            torch.cat([part.right for part in parts], dim=0)
        )
        return {"delta": merged * (values.sum() / max(1, len(values)))}
