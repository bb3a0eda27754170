"""What NSGA-III does by itself: reference points, population, normalisation, niches."""

from __future__ import annotations

import numpy as np
import pytest

from optimizer.algorithms import Outcome
from optimizer.algorithms.nsga3 import Nsga3, _intercepts
from optimizer.errors import InvalidInput
from tests.optimizer.algorithms.driving import Case, make_context, reals


def nsga3(objectives: int, options: dict[str, object]) -> Nsga3:
    algorithm = Case("nsga3", options).make(make_context(reals(3), objectives=objectives))
    assert isinstance(algorithm, Nsga3)
    return algorithm


def told(rows: list[list[float]]) -> list[Outcome]:
    return [Outcome(index, np.full(3, float(index)), np.array(row)) for index, row in enumerate(rows)]


def chosen(algorithm: Nsga3, rows: list[list[float]]) -> list[int]:
    outcomes = told(rows)
    for outcome in outcomes:
        algorithm.tell(outcome)
    return [outcome.index for outcome in algorithm._select(outcomes)]


def test_whole_fronts_come_first() -> None:
    rows = [[5.0, 5.0], [0.0, 1.0], [6.0, 6.0], [1.0, 0.0], [0.4, 0.4], [2.0, 2.0]]
    assert set(chosen(nsga3(2, {"population": 4}), rows)) == {1, 3, 4, 5}


def test_each_niche_keeps_its_nearest() -> None:
    """Of five in a crowd and one at each end and in the middle, the crowd keeps one."""
    crowd = [[0.1 + 0.01 * k, 0.9 - 0.01 * k] for k in range(5)]
    rows = [*crowd, [0.0, 1.0], [0.5, 0.5], [1.0, 0.0], [0.8, 0.2]]
    picked = chosen(nsga3(2, {"population": 4, "reference_points": [[0, 1], [1, 1], [3, 1], [1, 0]]}), rows)
    assert {5, 6, 7, 8} == set(picked)


def test_scales_are_those_of_the_plane_through_the_extremes() -> None:
    extremes = np.array([[2.0, 0.0, 0.0], [0.0, 30.0, 0.0], [0.0, 0.0, 0.1]])
    np.testing.assert_allclose(_intercepts(extremes, np.ones(3)), [2.0, 30.0, 0.1])


@pytest.mark.parametrize(
    "extremes", [[[1.0, 0.5], [1.0, 0.5]], [[0.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [0.9, 0.0]]], ids=str
)
def test_where_there_is_no_such_plane_the_nadir_counts(extremes: list[list[float]]) -> None:
    np.testing.assert_allclose(_intercepts(np.array(extremes), np.array([3.0, 0.0])), [3.0, 1.0])


def test_population_holds_the_reference_points() -> None:
    algorithm = nsga3(3, {"population": 20})
    assert algorithm.batch_size == 20
    assert len(algorithm._lines) == 15


def test_impossible_reference_points_are_refused() -> None:
    with pytest.raises(InvalidInput) as caught:
        nsga3(3, {"reference_points": [[1.0, 0.0]]})
    assert caught.value.field == "algorithm.options.reference_points.0"
