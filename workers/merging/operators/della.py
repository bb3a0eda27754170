"""DELLA: drop small entries more often than large ones, then merge the experts that agree on a sign."""

from __future__ import annotations

from torch import Tensor

from workers.merging.deltas import (
    RandomRescale,
    VoteOptions,
    by_rank,
    density_option,
    elect_and_sum,
    epsilon_option,
    normalise_option,
    random_rescale_option,
    seed_option,
)
from workers.merging.kernels.terms import Combine
from workers.merging.operator import Parameter, operator


class DellaOptions(VoteOptions):
    """Options of `della`."""

    density: float = density_option(0.5)
    epsilon: float = epsilon_option()
    normalise: Combine = normalise_option("mean")
    rescale: RandomRescale = random_rescale_option()
    seed: int = seed_option()


@operator(
    "della",
    summary="Drops small entries of each task vector more often, elects a sign per weight, and merges those that agree.",
    reference="Deep et al., DELLA-Merging, arXiv 2406.11617",
    options=DellaOptions,
    elementwise=True,
)
def della(parameter: Parameter, out: Tensor) -> None:
    """Drop as `della_linear` does, then merge as `ties` does; see `MergeFunction`."""
    elect_and_sum(parameter, out, by_rank(parameter))
