"""What NSGA-II does beyond the contract: fronts, constraints, parents, guests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from optimizer.algorithms import Outcome
from optimizer.pareto import hypervolume
from optimizer.space import Genome
from tests.optimizer.algorithms.driving import (
    Case,
    Log,
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


def zdt1(genome: Genome) -> Losses:
    """Zitzler, Deb and Thiele 2000: a convex front, on the unit cube."""
    g = 1 + 9 * genome[1:].mean()
    return np.array([genome[0], g * (1 - np.sqrt(genome[0] / g))])


def dtlz2(genome: Genome) -> Losses:
    """Deb, Thiele, Laumanns and Zitzler 2002: an eighth of a sphere, three objectives."""
    radius = 1 + np.square(genome[2:] - 0.5).sum()
    a, b = genome[:2] * np.pi / 2
    return float(radius) * np.array([np.cos(a) * np.cos(b), np.cos(a) * np.sin(b), np.sin(a)])


def volume(log: Log, reference: float) -> float:
    losses = np.array([outcome.losses for outcome in outcomes_of(log) if outcome.losses is not None])
    return hypervolume(losses, np.full(losses.shape[1], reference))


def compare(losses: Callable[[Genome], Losses], dim: int, reference: float, budget: int) -> tuple[float, float]:
    """Hypervolumes of NSGA-II and of random search, each the worst of three seeds and the best of three."""
    space = reals(dim, 0.0, 1.0)
    objectives = len(losses(space.low))

    def volumes(case: Case) -> list[float]:
        contexts = [make_context(space, objectives=objectives, seed=seed, budget=budget) for seed in range(3)]
        return [volume(drive(case.make(context), clean(losses), budget), reference) for context in contexts]

    return min(volumes(NSGA2)), max(volumes(Case("random")))


def test_zdt1() -> None:
    """The whole front has 0.8767 below (1.1, 1.1)."""
    evolved, at_random = compare(zdt1, dim=12, reference=1.1, budget=1500)
    assert evolved > 0.7
    assert at_random < 0.3


def test_dtlz2() -> None:
    """The whole front has 1.331 - π/6 = 0.807 below (1.1, 1.1, 1.1)."""
    evolved, at_random = compare(dtlz2, dim=10, reference=1.1, budget=1500)
    assert evolved > 0.65
    assert at_random < 0.5


def test_constraints_come_first() -> None:
    """The better the first objective, the more the constraint is violated; only the last tenth is feasible."""
    space = reals(5, 0.0, 1.0)

    def evaluate(index: int, genome: Genome, own: bool) -> Outcome:
        mean = float(genome.mean())
        return Outcome(index, genome, np.array([mean, 1 - genome[0]]), violation=max(0.0, 0.9 - mean), own=own)

    outcomes = outcomes_of(drive(NSGA2.make(make_context(space, budget=600)), evaluate, 600))
    assert not any(outcome.feasible for outcome in outcomes[:12]), "the start gives nothing away"
    assert np.mean([outcome.feasible for outcome in outcomes[-60:]]) > 0.5


def test_parents_are_earlier_candidates() -> None:
    space = reals(4)
    log = drive(NSGA2.make(make_context(space)), clean(smooth(space, 2)), 100, foreign=[space.low, space.high])
    index = 2
    for proposal in proposals_of(log):
        assert all(0 <= parent < index for parent in proposal.parents)
        assert bool(proposal.parents) == (proposal.generation > 0)
        index += 1


def test_a_good_guest_becomes_a_parent() -> None:
    space = reals(6)
    optimum = space.low + 0.3 * (space.high - space.low)
    log = drive(NSGA2.make(make_context(space)), clean(smooth(space)), 40, foreign=[space.high, optimum])
    assert any(1 in proposal.parents for proposal in proposals_of(log))


def test_a_guest_outside_the_bounds_has_children_inside() -> None:
    space = reals(6, 0.0, 1.0)

    def losses(genome: Genome) -> Losses:
        return np.array([-genome.sum()])

    log = drive(NSGA2.make(make_context(space)), clean(losses), 60, foreign=[space.high + 1])
    assert any(0 in proposal.parents for proposal in proposals_of(log))
    assert max(proposal.genome.max() for proposal in proposals_of(log)) <= 1.0


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
