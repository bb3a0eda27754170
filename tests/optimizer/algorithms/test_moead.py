"""What MOEA/D does by itself: problems, replacement, steady state."""

from __future__ import annotations

import numpy as np
import pytest

from optimizer.algorithms import Outcome
from optimizer.algorithms.moead import Moead
from optimizer.errors import InvalidInput
from tests.optimizer.algorithms.driving import Case, clean, drive, make_context, proposals_of, reals, smooth


def moead(options: dict[str, object], objectives: int = 2, budget: int | None = 200) -> Moead:
    algorithm = Case("moead", options).make(make_context(reals(2), objectives=objectives, budget=budget))
    assert isinstance(algorithm, Moead)
    return algorithm


def outcome(index: int, *losses: float, violation: float = 0.0) -> Outcome:
    return Outcome(index, np.full(2, float(index)), np.array(losses), violation, own=False)


def holders(algorithm: Moead) -> list[int]:
    return [holder.index for holder in algorithm._holders]


@pytest.mark.parametrize(
    ("budget", "objectives", "problems"), [(1, 2, 12), (1000, 2, 25), (None, 2, 100), (1000, 3, 21), (1000, 1, 1)]
)
def test_problems_suit_budget_and_objectives(budget: int | None, objectives: int, problems: int) -> None:
    assert len(moead({}, objectives, budget)._decomposition.weights) == problems


def test_the_first_outcomes_are_shared_out() -> None:
    algorithm = moead({"population": 3})
    for each in (outcome(0, 0.0, 1.0), outcome(1, 1.0, 0.0), outcome(2, 0.3, 0.3)):
        algorithm.tell(each)
    by_weight = dict(zip(map(tuple, algorithm._decomposition.weights), holders(algorithm), strict=True))
    assert by_weight == {(1.0, 0.0): 0, (0.5, 0.5): 2, (0.0, 1.0): 1}


def test_a_child_takes_the_places_where_it_gains_most() -> None:
    algorithm = moead({"population": 11, "replacements": 2})
    algorithm.tell(outcome(0, 0.0, 1.0))
    for index in range(1, 12):
        algorithm.tell(outcome(index, 1.0, 0.0))
    algorithm.tell(outcome(20, 0.05, 0.05))
    places = [place for place, holder in enumerate(holders(algorithm)) if holder == 20]
    assert len(places) == 2
    assert {abs(place - 5) for place in places} <= {0, 1}, "in the middle, where both ends are worst"


def test_less_violation_wins_whatever_the_losses() -> None:
    algorithm = moead({"population": 5, "replacements": 5})
    algorithm.tell(outcome(0, 0.0, 0.0, violation=2.0))
    algorithm.tell(outcome(1, 9.0, 9.0, violation=1.0))
    assert set(holders(algorithm)) == {1}
    algorithm.tell(outcome(2, 0.0, 0.0, violation=1.5))
    assert set(holders(algorithm)) == {1}
    algorithm.tell(outcome(3, 99.0, 99.0))
    assert set(holders(algorithm)) == {3}
    algorithm.tell(outcome(4, 5.0, 99.0))
    assert 4 in holders(algorithm)


def test_it_never_waits() -> None:
    algorithm = moead({})
    assert len(algorithm.ask(100)) == 100
    assert not any(proposal.parents for proposal in algorithm.ask(10)), "nothing is known"
    algorithm.tell(outcome(0, 1.0, 1.0))
    assert len(algorithm.ask(100)) == 100


def test_children_differ_from_their_parents() -> None:
    space = reals(3)
    log = drive(
        Case("moead", {"mutation_probability": 0.01}).make(make_context(space, objectives=2)),
        clean(smooth(space, 2)),
        150,
    )
    proposals = proposals_of(log)
    for proposal in proposals:
        assert all((proposal.genome != proposals[parent].genome).any() for parent in proposal.parents)


def test_impossible_directions_are_refused() -> None:
    with pytest.raises(InvalidInput) as caught:
        moead({"directions": [[1.0, 0.0], [-1.0, 0.0]]})
    assert caught.value.field == "algorithm.options.directions.1"
