"""What NSGA-II does by itself: parents, first proposals, mixed variables, population."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from optimizer.algorithms import Outcome
from tests.optimizer.algorithms.driving import (
    Case,
    clean,
    drive,
    make_context,
    mixed,
    outcomes_of,
    proposals_of,
    reals,
    smooth,
)

NSGA2 = Case("nsga2")
Losses = NDArray[np.float64]


def test_parents_are_earlier_candidates() -> None:
    space = reals(4)
    log = drive(NSGA2.make(make_context(space)), clean(smooth(space, 2)), 100, foreign=[space.low, space.high])
    index = 2
    for proposal in proposals_of(log):
        assert all(0 <= parent < index for parent in proposal.parents)
        assert bool(proposal.parents) == (proposal.generation > 0)
        index += 1


def test_first_proposal_is_the_start_unless_it_is_known() -> None:
    space = reals(3)
    context = make_context(space)
    assert (NSGA2.make(context).ask(1)[0].genome == context.start).all()
    algorithm = NSGA2.make(context)
    algorithm.tell(Outcome(0, context.start, np.array([1.0]), own=False))
    assert all((proposal.genome != context.start).any() for proposal in algorithm.ask(100))


def test_children_differ_from_their_parents() -> None:
    """A copy would cost no evaluation but waste a place."""
    space = mixed()
    context = make_context(space)
    case = Case("nsga2", {"crossover_probability": 0.0, "mutation_probability": 0.01})
    log = drive(case.make(context), clean(smooth(space)), 120)
    genomes = {outcome.index: outcome.genome for outcome in outcomes_of(log)}
    for proposal in proposals_of(log):
        assert all((proposal.genome != genomes[parent]).any() for parent in proposal.parents)


def test_discrete_values_are_canonical() -> None:
    """Equal values have equal genomes, so that equal merges are seen to be equal."""
    space = mixed()
    for proposal in proposals_of(drive(NSGA2.make(make_context(space)), clean(smooth(space)), 120)):
        assert (proposal.genome[2:4] == np.round(proposal.genome[2:4])).all()
        assert (proposal.genome[4:] % 1 == 0.5).all()


def test_population_suits_budget_and_workers() -> None:
    sizes = [
        NSGA2.make(make_context(reals(3), budget=budget, parallel=parallel)).batch_size
        for budget, parallel in [(1, 1), (200, 1), (1800, 1), (1800, 8), (None, 1), (10**6, 64)]
    ]
    assert sizes == [12, 12, 30, 32, 100, 128]
