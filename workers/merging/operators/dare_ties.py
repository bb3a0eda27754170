"""DARE with sign election: drop entries at random, then merge the experts that agree on a sign."""

from __future__ import annotations

from torch import Tensor

from workers.merging.deltas import (
    RandomRescale,
    VoteOptions,
    at_random,
    density_option,
    elect_and_sum,
    normalise_option,
    random_rescale_option,
    seed_option,
)
from workers.merging.kernels.terms import Combine
from workers.merging.operator import Parameter, operator


class DareTiesOptions(VoteOptions):
    """Options of `dare_ties`."""

    density: float = density_option(0.5)
    normalise: Combine = normalise_option("sum")
    rescale: RandomRescale = random_rescale_option()
    seed: int = seed_option()


@operator(
    "dare_ties",
    summary="Drops entries of each task vector at random, elects a sign per weight, and merges the experts that agree.",
    reference="Yu et al., Language Models are Super Mario (DARE), arXiv 2311.03099, with the merge of arXiv 2306.01708",
    options=DareTiesOptions,
    elementwise=True,
)
def dare_ties(parameter: Parameter, out: Tensor) -> None:
    """Drop as `dare_linear` does, then merge as `ties` does; see `MergeFunction`."""
    elect_and_sum(parameter, out, at_random(parameter))
