"""TIES: trim, elect sign, disjoint merge."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from workers.merging.deltas import (
    Rescale,
    Scope,
    VoteOptions,
    by_magnitude,
    density_option,
    elect_and_sum,
    normalise_option,
    rescale_option,
)
from workers.merging.kernels.terms import Combine
from workers.merging.operator import Parameter, operator


class TiesOptions(VoteOptions):
    """Options of `ties`."""

    density: float = density_option(0.2)
    normalise: Combine = normalise_option("mean")
    scope: Scope = Field(
        default="tensor",
        description="Whether the largest entries of each `tensor` are kept, or those of the whole `model`, as in the paper.",
    )
    rescale: Rescale = rescale_option()


@operator(
    "ties",
    summary="Keeps the largest entries of each task vector, elects a sign per weight, and merges the experts that agree.",
    reference="Yadav et al., TIES-Merging, arXiv 2306.01708",
    options=TiesOptions,
    elementwise=True,
)
def ties(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · Σ_{agreeing} w_i τ_i [/ Σ_{agreeing} |w_i|] over trimmed task vectors; see `MergeFunction`.

    Entries as large as the smallest kept one are all kept, where mergekit breaks such ties by position; of every tensor
    at least one entry is. With the scope `model` one entry more than the density says is kept, as in the paper's code
    (and fusion_bench's). The elected sign is plus where the votes are even, where that code takes the sign that most
    entries of the model have.

    For coefficients ≥ 0, `mean` is mergekit's normalised merge; for others mergekit divides by the signed sum, which can
    vanish. For equal coefficients it is the paper's disjoint mean. `sum` is usual with a scale of about 0.3; `max` is the
    paper's third form.
    """
    elect_and_sum(parameter, out, by_magnitude(parameter))
