"""Model breadcrumbs with sign election."""

from __future__ import annotations

from torch import Tensor

from workers.merging.deltas import (
    Rescale,
    VoteOptions,
    by_magnitude,
    density_option,
    elect_and_sum,
    gamma_option,
    normalise_option,
    rescale_option,
)
from workers.merging.kernels.terms import Combine
from workers.merging.operator import Parameter, operator


class BreadcrumbsTiesOptions(VoteOptions):
    """Options of `breadcrumbs_ties`."""

    density: float = density_option(0.9)
    gamma: float = gamma_option()
    normalise: Combine = normalise_option("sum")
    rescale: Rescale = rescale_option()


@operator(
    "breadcrumbs_ties",
    summary="Drops the extremes of each task vector, elects a sign per weight, and merges the experts that agree.",
    reference="Davari and Belilovsky, Model Breadcrumbs, arXiv 2312.06795, with the merge of arXiv 2306.01708",
    options=BreadcrumbsTiesOptions,
    elementwise=True,
)
def breadcrumbs_ties(parameter: Parameter, out: Tensor) -> None:
    """Drop as `breadcrumbs` does, then merge as `ties` does; see `MergeFunction`."""
    elect_and_sum(parameter, out, by_magnitude(parameter, gamma=True))
