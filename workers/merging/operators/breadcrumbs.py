"""Model breadcrumbs: drop the smallest and the very largest entries of the task vectors."""

from __future__ import annotations

from torch import Tensor

from workers.merging.deltas import (
    Rescale,
    SumOptions,
    by_magnitude,
    density_option,
    gamma_option,
    rescale_option,
    sum_up,
)
from workers.merging.operator import Parameter, operator


class BreadcrumbsOptions(SumOptions):
    """Options of `breadcrumbs`."""

    density: float = density_option(0.9)
    gamma: float = gamma_option()
    rescale: Rescale = rescale_option()


@operator(
    "breadcrumbs",
    summary="Drops the smallest and the very largest entries of each task vector and adds the others to the base.",
    reference="Davari and Belilovsky, Model Breadcrumbs, arXiv 2312.06795",
    options=BreadcrumbsOptions,
    elementwise=True,
)
def breadcrumbs(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · Σ w_i m_i τ_i [/ Σ w_i], m_i without the extremes of τ_i; see `MergeFunction`.

    Of the n entries of a tensor the ⌊γ n⌋ largest are dropped, and as many of the smallest as leave ⌊density · n⌋ (at
    least one); fewer of the largest where the density leaves no room, none at a density of 1. Where ⌊γ n⌋ is 0 no large
    one is dropped; mergekit before 0.1.5 drops everything there, so that small tensors become the base's. Entries as
    large as one at either end of what is kept are kept as well.

    Raises:
        InfeasibleCandidate: with ``normalise``, the coefficients sum to almost nothing.
    """
    sum_up(parameter, out, by_magnitude(parameter, gamma=True))
