"""EMR: the unified task vector of Elect, Mask and Rescale merging."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.merging.merged_vectors import add_merged_vector, merge_task_vectors
from workers.merging.operator import Parameter, Whole, operator


@operator(
    "emr",
    summary="Elects a sign for each weight and takes the largest change in that direction.",
    reference="Huang et al., EMR-Merging, arXiv 2405.17461",
    columns="scale",
    elementwise=True,
)
def emr(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · s · max {|τ_i| : sign τ_i = s}, s the sign of Σ τ_i; see `MergeFunction`.

    This is the vector that all tasks share; the masks and rescalings that the paper applies for one task at a time
    make a model for each task and are no merge. The vector is a fact of the models.
    """
    add_merged_vector(parameter, out, "emr", _merged)


def _merged(whole: Whole) -> Tensor:
    def combine(deltas: list[Tensor]) -> Tensor:
        total = torch.zeros_like(deltas[0])
        highest, lowest = torch.zeros_like(total), torch.zeros_like(total)
        for delta in deltas:
            total += delta
            torch.maximum(highest, delta, out=highest)
            torch.minimum(lowest, delta, out=lowest)
        return torch.where(total > 0, highest, lowest)

    return merge_task_vectors(whole, combine)
