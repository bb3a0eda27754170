"""CycleQD's archives and their turns; what every algorithm must do is in the conformance suite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from optimizer.algorithms import Outcome
from optimizer.algorithms.cycle_qd import CycleQd
from optimizer.errors import InvalidInput
from optimizer.tables import TableSpace
from tests.optimizer.algorithms.archives import accuracy, judge, make
from tests.optimizer.algorithms.driving import Case, drive, make_context, outcomes_of, reals


def told(values: list[tuple[float, ...]], **options: Any) -> CycleQd:
    algorithm = CycleQd(make_context(reals(2), objectives=len(values[0])), CycleQd.Options(**options))
    for index, row in enumerate(values):
        algorithm.tell(Outcome(index, np.array([0.1 * index, 0.0]), -np.array(row), own=False))
    return algorithm


def test_the_quality_rotates() -> None:
    """Candidates 0 and 1 share a cell of the second objective's values, 0 and 2 one of the first's."""
    algorithm = told([(0.5, 0.5), (0.7, 0.51), (0.51, 0.1)], bins=5, generation=3)
    proposals = algorithm.ask(600)
    turns = [{parent for each in proposals[turn::6] for parent in each.parents} for turn in range(6)]
    assert turns == [{1, 2}] * 3 + [{0, 1}] * 3
    assert [each.generation for each in proposals[:7]] == [0, 0, 0, 1, 1, 1, 2]


def test_elite_sampling_prefers_the_better_mildly() -> None:
    """γ runs from 0.5 to 0.8 for each value: the best on both has (0.8 / 0.5)² times the chance of the worst on both."""
    algorithm = told([(0.1, 0.1), (0.9, 0.9)])
    drawn = [parent for each in algorithm.ask(4000) for parent in each.parents * (3 - len(each.parents))]
    assert drawn.count(1) / drawn.count(0) == pytest.approx(0.64 / 0.25, rel=0.15)


def test_children_are_means_of_task_vectors() -> None:
    algorithm = told([(0.1, 0.9), (0.9, 0.1)], mutation=0.0, spread=0.0)
    mixed = [each.genome for each in algorithm.ask(100) if len(each.parents) == 2]
    assert mixed
    for genome in mixed:
        np.testing.assert_allclose(genome, [0.05, 0.0])


@pytest.mark.parametrize("representation", ["table", "coefficients"])
def test_improves_every_task(representation: str) -> None:
    algorithm, space = make(Case("cycle_qd", {"representation": representation}))
    log = drive(algorithm, judge(space), 400)
    found = [outcome for outcome in outcomes_of(log) if outcome.losses is not None]
    start = found[0].losses
    assert start is not None
    for task in range(2):
        assert min(each.losses[task] for each in found if each.losses is not None) < start[task] - 0.3
    assert max(accuracy(each) for each in found) > accuracy(found[0])


def test_needs_a_linear_merge_for_tables_only() -> None:
    assert isinstance(make(Case("cycle_qd", {"representation": "table"}))[1], TableSpace)
    assert make(Case("cycle_qd"), operator="ties")[1].dim
    with pytest.raises(InvalidInput):
        make(Case("cycle_qd", {"representation": "table"}), operator="ties")
