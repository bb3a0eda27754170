"""MagMax: of all task vectors' entries at a place, the largest."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.merging.merged_vectors import add_merged_vector, merge_task_vectors
from workers.merging.operator import Parameter, Whole, operator


@operator(
    "magmax",
    summary="Takes for each weight the largest change that any expert makes to it.",
    reference="Marczak et al., MagMax, arXiv 2407.06322",
    columns="scale",
    elementwise=True,
)
def magmax(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · τ_m, where m is the expert with the largest |τ|, entry by entry; see `MergeFunction`.

    The paper's scale for experts that were tuned independently is 0.5. Of two opposite entries of the same magnitude the
    positive one is taken (in the authors' code the later expert's), so that the experts' order does not matter. The
    merged task vector is a fact of the models.
    """
    add_merged_vector(parameter, out, "magmax", _merged)


def _merged(whole: Whole) -> Tensor:
    def combine(deltas: list[Tensor]) -> Tensor:
        highest, lowest = deltas[0].clamp(min=0.0), deltas[0].clamp(max=0.0)
        for delta in deltas[1:]:
            torch.maximum(highest, delta, out=highest)
            torch.minimum(lowest, delta, out=lowest)
        return torch.where(highest >= -lowest, highest, lowest)

    return merge_task_vectors(whole, combine)
