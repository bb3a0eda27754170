"""Pruning of a task vector, before a merge or after it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from workers.merging.deltas import (
    RandomRescale,
    Scope,
    SumOptions,
    at_random,
    by_magnitude,
    density_option,
    seed_option,
    sum_up,
)
from workers.merging.operator import Parameter, operator


class PruneOptions(SumOptions):
    """Options of `prune`."""

    density: float = density_option(0.5)
    method: Literal["magnitude", "random"] = Field(
        default="magnitude", description="Whether the largest entries are kept, or any."
    )
    scope: Scope = Field(
        default="tensor",
        description="Whether the largest entries of each `tensor` are kept, or those of the whole `model`.",
    )
    rescale: RandomRescale = Field(
        default="none",
        description=(
            "`probability` divides what is kept by the density; a norm scales it up to that norm of the tensor's whole task "
            "vector."
        ),
    )
    seed: int = seed_option()


@operator(
    "prune",
    summary="Keeps a share of a task vector, the largest entries or random ones.",
    reference="Zhu and Gupta, To prune, or not to prune, arXiv 1710.01878; on task vectors as in arXiv 2311.03099",
    options=PruneOptions,
    elementwise=True,
    modifier=True,
)
def prune(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · Σ w_i m_i τ_i; see `MergeFunction`.

    Selects as `ties` (with its scopes) or as `dare_linear` does, layer by layer where coefficients or densities differ
    between groups.
    """
    sum_up(parameter, out, by_magnitude(parameter) if parameter.options.method == "magnitude" else at_random(parameter))
