"""DELLA without sign election: drop small entries of the task vectors more often than large ones."""

from __future__ import annotations

from torch import Tensor

from workers.merging.deltas import (
    RandomRescale,
    SumOptions,
    by_rank,
    density_option,
    epsilon_option,
    random_rescale_option,
    seed_option,
    sum_up,
)
from workers.merging.operator import Parameter, operator


class DellaLinearOptions(SumOptions):
    """Options of `della_linear`."""

    density: float = density_option(0.5)
    epsilon: float = epsilon_option()
    rescale: RandomRescale = random_rescale_option()
    seed: int = seed_option()


@operator(
    "della_linear",
    summary="Drops entries of each task vector at random, small ones more often, and adds the others to the base.",
    reference="Deep et al., DELLA-Merging, arXiv 2406.11617",
    options=DellaLinearOptions,
    elementwise=True,
)
def della_linear(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · Σ w_i m_i τ_i / p_i [/ Σ w_i]; see `MergeFunction`.

    An entry's probability of being kept, p_i, grows evenly with the rank of its magnitude within its row, from
    density − ε to density + ε; what lies outside 0 … 1 is as good as 0 or 1, where mergekit refuses it. Rows run along
    the second dimension as in mergekit; a vector is one row, and an entry alone in its row has the density itself.
    Ranks take two bytes an entry; those in rows of more than 65,536 entries are rounded down to one of so many.

    Raises:
        InfeasibleCandidate: with ``normalise``, the coefficients sum to almost nothing.
    """
    sum_up(parameter, out, by_rank(parameter))
