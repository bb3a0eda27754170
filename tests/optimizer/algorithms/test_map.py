"""MAP: its plan, its rounds, nested pairs, and sampling by angles."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from optimizer.algorithms import Outcome
from optimizer.errors import InvalidInput
from optimizer.pareto import hypervolume
from optimizer.space import Genome, SearchSpace
from optimizer.surrogates import angles
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
    replay,
    smooth,
)


def known_experts(space: SearchSpace) -> list[Genome]:
    return [np.zeros(space.dim), *np.eye(space.dim)]


def test_the_plan_has_what_is_not_known_yet_and_then_rounds_are_labelled() -> None:
    space = reals(3)
    context = make_context(space, objectives=2, budget=60)
    log = drive(Case("map").make(context), clean(smooth(space, 2)), 50, foreign=known_experts(space))
    told = {outcome.genome.tobytes() for outcome in outcomes_of(log)[:4]}
    proposals = proposals_of(log)
    assert not told & {proposal.genome.tobytes() for proposal in proposals}
    assert any(np.allclose(proposal.genome, context.start) for proposal in proposals[:6])
    planned = [proposal for proposal in proposals if proposal.label is None]
    assert len(planned) == 10 - 4, "(N + 1)(N + 2) / 2 in all"
    assert all(re.fullmatch(r"front point \d of 5, R² [01]\.\d\d", p.label or "") for p in proposals[6:])
    assert proposals[-1].generation > proposals[0].generation


def test_a_plan_without_warm_starts_has_experts_and_diagonals() -> None:
    space = reals(3)
    algorithm = Case("map", {"plan": 12}).make(make_context(space))
    genomes = [tuple(np.round(proposal.genome, 6)) for proposal in algorithm.ask(12)]
    assert {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)} <= set(genomes)
    assert len(set(genomes)) == 12


@pytest.mark.parametrize("objectives", [2, 3])
def test_covers_the_front_better_than_random_search(objectives: int) -> None:
    space, reference = reals(4), np.full(objectives, 0.12)

    def volume(name: str, budget: int) -> float:
        context = make_context(space, objectives=objectives, budget=budget)
        log = drive(Case(name).make(context), clean(smooth(space, objectives)), budget)
        return hypervolume(np.array([outcome.losses for outcome in outcomes_of(log)]), reference)

    assert volume("map", 60) > volume("random", 300)


def test_shares_that_are_maximised() -> None:
    space = reals(3)
    losses = smooth(space)
    log = drive(Case("map").make(make_context(space, budget=60)), clean(lambda g: -0.9 * np.exp(-8 * losses(g))), 60)
    assert best_loss(log) < -0.898


def test_integers_and_choices_are_found() -> None:
    space = mixed()
    log = drive(Case("map").make(make_context(space, budget=120)), clean(smooth(space)), 120)
    assert best_loss(log) < 0.02


def test_nested_pairs_reach_a_good_merge_of_many_experts() -> None:
    space = reals(16)
    wanted = np.tile([0.6, 0.3, 0.0, 0.1], 4)

    def losses(genome: Genome) -> NDArray[np.float64]:
        error = (genome - wanted) ** 2
        return np.array([error[:8].sum() + 0.2 * error[8:].sum(), error[8:].sum() + 0.2 * error[:8].sum()])

    context = make_context(space, objectives=2, budget=160)
    case = Case("map", {"nested": True, "nested_evaluations": 6})
    log = drive(case.make(context), clean(losses), 130)
    proposals = proposals_of(log)
    assert [proposal.label for proposal in proposals[:8]] == ["pair of 16"] * 8
    assert sum((proposal.label or "").startswith("pair of") for proposal in proposals) == 15 * 6
    assert best_loss(log) < 0.2 * float(losses(np.zeros(16)).sum())
    replay(case.make(context), log)


def test_angles_sample_where_predictions_are_bad() -> None:
    space = reals(2)
    context = make_context(space, objectives=2, budget=60)
    case = Case("map", {"sampling": "angles", "plan": 16})
    log = drive(case.make(context), clean(smooth(space, 2)), 40, foreign=known_experts(space))
    drawn = np.array([proposal.genome for proposal in proposals_of(log) if proposal.label is None])
    assert len(drawn) == 13 and (drawn[7:] >= 0).all() and (drawn[7:] <= 1).all()
    replay(case.make(context), log)
    points = np.array([[1.0, 0.05], [0.05, 1.0], [0.6, 0.5], [0.5, 0.8]])
    random = np.random.default_rng(0)
    next_ones = np.array([angles.draw(points, np.array([0.0, 1.0, 0.0, 0.0]), random) for _ in range(40)])
    assert (next_ones[:, 1] > 2 * next_ones[:, 0]).mean() > 0.9


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=5))
@settings(max_examples=50, deadline=None)
def test_angles_and_directions_are_inverse(values: list[float]) -> None:
    point = np.array(values)
    back = angles.of_angles(angles.angles(point[None])[0])
    np.testing.assert_allclose(back, point / np.linalg.norm(point), atol=1e-12)


@pytest.mark.parametrize(
    ("options", "space", "field"),
    [
        ({"nested": True}, mixed(), "nested"),
        ({"nested": True}, reals(3, low=0.2), "nested"),
        ({"sampling": "angles"}, reals(9), "sampling"),
        ({"sampling": "angles"}, mixed(), "sampling"),
    ],
)
def test_refuses_what_it_cannot_do(options: dict[str, object], space: SearchSpace, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Case("map", options).make(make_context(space))
    assert caught.value.field == f"algorithm.options.{field}"


def test_outcomes_on_few_items_are_left_out_of_the_fit() -> None:
    space = reals(2)
    context = make_context(space, budget=60)
    one, other = (Case("map").make(context) for _ in range(2))
    losses, random = smooth(space), np.random.default_rng(1)
    for index in range(12):
        genome = space.low + random.random(2) * 2
        for algorithm in (one, other):
            algorithm.tell(Outcome(index, genome, losses(genome), own=False))
    one.tell(Outcome(12, space.high, -100 * np.ones(1), own=False, items=5))
    assert [p.genome.tobytes() for p in one.ask(6)] == [p.genome.tobytes() for p in other.ask(6)]
