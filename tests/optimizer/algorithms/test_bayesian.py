"""Bayesian optimisation beyond what the conformance suite asks of every algorithm."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from optimizer.algorithms import ALGORITHMS, Outcome
from optimizer.algorithms.bayesian import Bayesian
from optimizer.pareto import hypervolume
from optimizer.space import Genome
from tests.optimizer.algorithms.driving import (
    Case,
    best_loss,
    clean,
    drive,
    make_context,
    mixed,
    outcomes_of,
    proposals_of,
    reals,
    smooth,
    troubled,
)


def test_finds_a_smooth_optimum_in_a_few_dozen_evaluations() -> None:
    space = reals(5)
    log = drive(Case("bayesian").make(make_context(space, budget=40)), clean(smooth(space)), 40)
    assert best_loss(log) < 1e-3


@pytest.mark.parametrize("objectives", [2, 3, 4])
@pytest.mark.slow
def test_covers_the_front_better_than_random_search(objectives: int) -> None:
    space, reference = reals(3), np.full(objectives, 0.2)

    def volume(name: str) -> float:
        context = make_context(space, objectives=objectives, budget=40)
        log = drive(Case(name).make(context), clean(smooth(space, objectives)), 40)
        return hypervolume(np.array([outcome.losses for outcome in outcomes_of(log)]), reference)

    assert volume("bayesian") > 1.02 * volume("random")


def test_learns_where_constraints_hold() -> None:
    space = reals(3)
    losses = smooth(space)

    def evaluate(index: int, genome: Genome, own: bool) -> Outcome:
        return Outcome(index, genome, losses(genome), max(0.0, 0.5 - float(genome[0])), own)

    log = drive(Case("bayesian").make(make_context(space, budget=50)), evaluate, 50)
    feasible = [float(o.losses.sum()) for o in outcomes_of(log) if o.feasible and o.losses is not None]
    assert min(feasible) < 1.1 * 0.2**2 / 3, "the optimum lies at the limit"
    late = [outcome.violation for outcome in outcomes_of(log)[25:]]
    assert np.median(late) < 0.01


def test_many_in_flight_look_in_different_places() -> None:
    space = reals(4)
    algorithm = Case("bayesian").make(make_context(space, parallel=16))
    losses = smooth(space)
    random = np.random.default_rng(0)
    for index in range(20):
        genome = space.low + random.random(4) * 2
        algorithm.tell(Outcome(index, genome, losses(genome), own=False))
    genomes = np.array([proposal.genome for proposal in algorithm.ask(18)[2:]])
    apart = np.abs(genomes[:, None] - genomes[None]).max(axis=2) + np.eye(16)
    assert apart.min() > 1e-3


def test_trust_region_and_few_observations() -> None:
    space = reals(25)
    case = Case("bayesian", {"trust_region": True, "max_observations": 50})
    log = drive(case.make(make_context(space, budget=120)), troubled(smooth(space)), 100)
    assert best_loss(log) < 0.5 * float(smooth(space)(space.low + 0.4 * 2)[0]) + 0.2


def recall(log: list[object], algorithm: Bayesian) -> None:
    for entry in log:
        if isinstance(entry, Outcome):
            algorithm.tell(entry)
        else:
            algorithm.recall([proposal.genome for proposal in entry.proposals])  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["bayesian", "forest", "map"])
def test_a_recalled_log_goes_on_as_one_that_was_lived_through(name: str) -> None:
    space = mixed()
    context = make_context(space, objectives=2, parallel=3, budget=60)
    living = Case(name).make(context)
    log = drive(living, troubled(smooth(space, 2)), 35, foreign=[space.low])
    extra = living.ask(2)
    recalled = ALGORITHMS[name](context, ALGORITHMS[name].Options())
    recall([*log], recalled)  # type: ignore[arg-type]
    recalled.recall([proposal.genome for proposal in extra])
    for a, b in zip(living.ask(4), recalled.ask(4), strict=True):
        np.testing.assert_array_equal(a.genome, b.genome)
        assert (a.label, a.items, a.generation) == (b.label, b.items, b.generation)


def test_partial_outcomes_are_left_out() -> None:
    space = reals(2)
    context = make_context(space)
    one, other = (Case("bayesian").make(context) for _ in range(2))
    losses = smooth(space)
    random = np.random.default_rng(1)
    for index in range(12):
        genome = space.low + random.random(2) * 2
        for algorithm in (one, other):
            algorithm.tell(Outcome(index, genome, losses(genome), own=False))
    one.tell(Outcome(12, space.high, -100 * np.ones(1), own=False, items=5))
    a, b = one.ask(3)[2].genome, other.ask(3)[2].genome
    np.testing.assert_array_equal(a, b)


def test_it_never_repeats_what_it_knows() -> None:
    space = mixed()
    log = drive(Case("bayesian").make(make_context(space)), clean(smooth(space)), 60)
    genomes: NDArray[np.float64] = np.array([proposal.genome for proposal in proposals_of(log)])
    assert len({genome.tobytes() for genome in genomes}) == len(genomes)
