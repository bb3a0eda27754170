"""What every search for a whole front must do beyond the contract: fronts, constraints, guests, any number of objectives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
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
    same,
    smooth,
)

NSGA2, NSGA3, MOEAD, MO_CMA = (Case(name) for name in ("nsga2", "nsga3", "moead", "mo_cma_es"))
VARIANTS = [
    Case("moead", {"decomposition": "tchebycheff"}),
    Case("moead", {"decomposition": "pbi"}),
    Case("moead", {"variation": "differential"}),
    Case("nsga2", {"variation": "crossover"}),
]
EVOLUTION = [NSGA2, NSGA3, MOEAD, *VARIANTS]
CASES = [*EVOLUTION, MO_CMA]

every_case = pytest.mark.parametrize("case", CASES, ids=str)

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


def losses_of(log: Log) -> Losses:
    return np.array([outcome.losses for outcome in outcomes_of(log) if outcome.losses is not None])


def volumes(case: Case, losses: Callable[[Genome], Losses], dim: int, reference: float, budget: int) -> list[float]:
    """Hypervolumes of three seeds."""
    space = reals(dim, 0.0, 1.0)
    objectives = len(losses(space.low))
    contexts = [make_context(space, objectives=objectives, seed=seed, budget=budget) for seed in range(3)]
    logs = [drive(case.make(context), clean(losses), budget) for context in contexts]
    return [hypervolume(losses_of(log), np.full(objectives, reference)) for log in logs]


@every_case
@pytest.mark.slow
def test_zdt1(case: Case) -> None:
    """The whole front has 0.8767 below (1.1, 1.1)."""
    found, at_random = volumes(case, zdt1, 8, 1.1, 800), volumes(Case("random"), zdt1, 8, 1.1, 800)
    assert np.median(found) > 0.45
    assert max(at_random) < 0.1


@every_case
@pytest.mark.slow
def test_dtlz2(case: Case) -> None:
    """The whole front has 1.331 - π/6 = 0.807 below (1.1, 1.1, 1.1)."""
    found, at_random = volumes(case, dtlz2, 10, 1.1, 800), volumes(Case("random"), dtlz2, 10, 1.1, 800)
    assert np.median(found) > 0.3
    assert np.median(found) > 1.4 * max(at_random)


@every_case
def test_constraints_come_first(case: Case) -> None:
    """The better the first objective, the more the constraint is violated; only the last tenth is feasible."""
    space = reals(5, 0.0, 1.0)

    def evaluate(index: int, genome: Genome, own: bool) -> Outcome:
        mean = float(genome.mean())
        return Outcome(index, genome, np.array([mean, 1 - genome[0]]), violation=max(0.0, 0.9 - mean), own=own)

    outcomes = outcomes_of(drive(case.make(make_context(space, objectives=2, budget=600)), evaluate, 600))
    assert not any(outcome.feasible for outcome in outcomes[:8]), "the start gives nothing away"
    assert np.mean([outcome.feasible for outcome in outcomes[-60:]]) > 0.3


@pytest.mark.parametrize("objectives", [1, 2, 4, 6])
@every_case
def test_any_number_of_objectives(case: Case, objectives: int) -> None:
    """The smaller the sum of losses, the nearer all optima: between 0.3 and 0.8 of the range."""
    space = reals(5)
    log = drive(
        case.make(make_context(space, objectives=objectives, budget=250)), clean(smooth(space, objectives)), 250
    )
    sums = losses_of(log).sum(axis=1)
    at_random = drive(
        Case("random").make(make_context(space, objectives=objectives)), clean(smooth(space, objectives)), 250
    )
    assert np.median(sums[-50:]) < 0.6 * np.median(losses_of(at_random).sum(axis=1))


@pytest.mark.parametrize("case", [NSGA3, MOEAD, MO_CMA], ids=str)
def test_scales_of_objectives_do_not_count(case: Case) -> None:
    space = reals(4)
    losses = smooth(space, 2)

    def proposals(scale: float) -> list[bytes]:
        algorithm = case.make(make_context(space, objectives=2))
        log = drive(algorithm, clean(lambda genome: losses(genome) * [1.0, scale]), 60)  # a power of two scales exactly
        return [proposal.genome.tobytes() for proposal in proposals_of(log)]

    assert proposals(1.0) == proposals(1024.0)


@pytest.mark.parametrize("case", EVOLUTION, ids=str)
def test_mixed_variables_reach_the_best_values(case: Case) -> None:
    """Two losses with optima on either side of the middle; discrete genomes are canonical, all values are tried."""
    space = mixed()
    log = drive(case.make(make_context(space, objectives=2, budget=400)), clean(smooth(space, 2)), 400)
    genomes = np.array([proposal.genome for proposal in proposals_of(log)])
    assert (genomes[:, 2:4] == np.round(genomes[:, 2:4])).all()
    assert (genomes[:, 4:] % 1 == 0.5).all()
    assert len(np.unique(genomes[:, 3])) > 5
    assert losses_of(log).sum(axis=1).min() < 0.05


@every_case
def test_a_good_guest_becomes_a_parent(case: Case) -> None:
    space = reals(6)
    optima = [space.low + place * (space.high - space.low) for place in (0.3, 0.4)]
    log = drive(
        case.make(make_context(space, objectives=2)), clean(smooth(space, 2)), 80, foreign=[space.high, *optima]
    )
    for guest in (1, 2):
        assert any(guest in proposal.parents for proposal in proposals_of(log))


@every_case
def test_a_guest_outside_the_bounds_has_children_inside(case: Case) -> None:
    space = reals(6, 0.0, 1.0)

    def losses(genome: Genome) -> Losses:
        return np.array([-genome.sum(), -genome[0]])

    log = drive(case.make(make_context(space, objectives=2)), clean(losses), 80, foreign=[space.high + 1])
    assert any(0 in proposal.parents for proposal in proposals_of(log))
    assert max(proposal.genome.max() for proposal in proposals_of(log)) <= 1.0


@every_case
def test_an_earlier_search_stands_for_a_first_population(case: Case) -> None:
    """A phase goes on from what is known: no random points once more."""
    space = reals(6)
    context = make_context(space, objectives=2)
    earlier = outcomes_of(drive(Case("random").make(context), clean(smooth(space, 2)), 150))
    algorithm = case.make(context)
    for outcome in earlier:
        algorithm.tell(replace(outcome, own=False))
    assert all(proposal.parents for proposal in algorithm.ask(10))


@every_case
def test_parents_are_earlier_candidates(case: Case) -> None:
    space = reals(4)
    log = drive(
        case.make(make_context(space, objectives=2)), clean(smooth(space, 2)), 100, foreign=[space.low, space.high]
    )
    for index, proposal in enumerate(proposals_of(log), start=2):
        assert all(0 <= parent < index for parent in proposal.parents)


@every_case
def test_partial_outcomes_of_others_are_ignored(case: Case) -> None:
    space = reals(4)
    losses = smooth(space, 2)
    context = make_context(space, objectives=2)
    plain, told = case.make(context), case.make(context)
    for index in range(3):
        told.tell(Outcome(index, space.high, losses(space.high) - 9, own=False, items=10))
    for index in itertools.count(3):
        proposals = plain.ask(5)
        assert same(proposals, told.ask(5))
        for proposal in proposals:
            outcome = Outcome(index, proposal.genome, losses(proposal.genome))
            plain.tell(outcome)
            told.tell(outcome)
        if index > 10:
            break


@every_case
def test_outcomes_in_any_order(case: Case) -> None:
    """As asynchronous jobs tell them."""
    space = reals(6)
    losses = smooth(space, 2)
    algorithm = case.make(make_context(space, objectives=2, parallel=8, budget=400))
    random = np.random.Generator(np.random.PCG64(0))
    flying: list[tuple[int, Genome]] = []
    found: list[Losses] = []
    index = 0
    while index < 400:
        for proposal in algorithm.ask(8 - len(flying)):
            flying.append((index, proposal.genome))
            index += 1
        number, genome = flying.pop(int(random.integers(len(flying))))
        found.append(losses(genome))
        algorithm.tell(Outcome(number, genome, found[-1]))
    assert min(row.sum() for row in found) < 0.02


@pytest.mark.parametrize(
    ("case", "option"), [(NSGA3, "reference_points"), (MOEAD, "directions")], ids=["nsga3", "moead"]
)
def test_wanted_directions(case: Case, option: str) -> None:
    """On a sphere's eighth, all the effort goes where the second objective counts little or much."""

    def second_over_first(directions: Sequence[Sequence[float]], decomposition: dict[str, str]) -> float:
        options = {option: directions, "population": 12, **decomposition}
        space = reals(6, 0.0, 1.0)

        def losses(genome: Genome) -> Losses:
            radius, angle = 1 + np.square(genome[1:] - 0.5).sum(), genome[0] * np.pi / 2
            return float(radius) * np.array([np.cos(angle), np.sin(angle)])

        log = drive(Case(case.name, options).make(make_context(space, objectives=2, budget=400)), clean(losses), 400)
        last = losses_of(log)[-60:]
        return float(np.median(last[:, 1] / last.sum(axis=1)))

    more: dict[str, str] = {"decomposition": "tchebycheff", "variation": "crossover"} if case.name == "moead" else {}
    # The ends keep the normalisation what it is.
    low = second_over_first([[1.0, 0.0], [1.0, 0.2], [1.0, 0.3], [0.0, 1.0]], more)
    high = second_over_first([[1.0, 0.0], [0.2, 1.0], [0.3, 1.0], [0.0, 1.0]], more)
    assert low < 0.45 < 0.55 < high
