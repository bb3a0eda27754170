"""DARE: drop entries of the task vectors at random, rescale the others, and add them to the base."""

from __future__ import annotations

from torch import Tensor

from workers.merging.deltas import (
    RandomRescale,
    SumOptions,
    at_random,
    density_option,
    random_rescale_option,
    seed_option,
    sum_up,
)
from workers.merging.operator import Parameter, operator


class DareLinearOptions(SumOptions):
    """Options of `dare_linear`."""

    density: float = density_option(0.5)
    rescale: RandomRescale = random_rescale_option()
    seed: int = seed_option()


@operator(
    "dare_linear",
    summary="Drops entries of each task vector at random, rescales the others, and adds them to the base.",
    reference="Yu et al., Language Models are Super Mario (DARE), arXiv 2311.03099",
    options=DareLinearOptions,
    elementwise=True,
)
def dare_linear(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · Σ w_i m_i τ_i / p_i [/ Σ w_i], m_i random with mean p_i, the density; see `MergeFunction`.

    Which entries are dropped depends on the expert's content, the parameter, the entry's number and the seed only: the
    same on every machine, in every stretch, and whatever the other experts are.

    Raises:
        InfeasibleCandidate: with ``normalise``, the coefficients sum to almost nothing.
    """
    sum_up(parameter, out, at_random(parameter))
