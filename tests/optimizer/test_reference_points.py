"""Evenly spread points on the simplex."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import InvalidInput
from optimizer.reference_points import das_dennis, given_points, spread_points


@given(st.integers(1, 6), st.integers(0, 6))
def test_das_dennis_has_every_multiple_once(objectives: int, partitions: int) -> None:
    points = das_dennis(objectives, partitions)
    assert points.shape == (comb(objectives + partitions - 1, partitions), objectives)
    np.testing.assert_allclose(points.sum(axis=1), 1.0)
    if partitions:
        np.testing.assert_allclose(points * partitions, np.round(points * partitions), atol=1e-12)
    assert len({tuple(np.round(row, 9)) for row in points}) == len(points)


@given(st.integers(1, 8), st.integers(1, 150))
def test_spread_points_fit_and_reach_every_corner(objectives: int, at_most: int) -> None:
    points = spread_points(objectives, at_most)
    assert len(points) <= max(at_most, objectives)
    np.testing.assert_allclose(points.sum(axis=1), 1.0)
    assert {tuple(row) for row in np.eye(objectives)} <= {tuple(row) for row in points}


def test_as_many_as_fit() -> None:
    assert [len(spread_points(2, count)) for count in (2, 7, 50)] == [2, 7, 50]
    assert [len(spread_points(3, count)) for count in (10, 14, 15, 100)] == [10, 10, 15, 91]
    assert len(spread_points(1, 50)) == 1


def test_many_objectives_have_an_inner_layer() -> None:
    points = spread_points(6, 30)
    inner = points[(points > 0).all(axis=1)]
    assert len(points) == 21 + 6
    np.testing.assert_allclose(inner.max(axis=1), 0.5 + 0.5 / 6)


def test_given_points_are_scaled() -> None:
    np.testing.assert_allclose(given_points([[2.0, 2.0], [0.0, 3.0]], 2, "x"), [[0.5, 0.5], [0.0, 1.0]])


@pytest.mark.parametrize("row", [[1.0], [1.0, -0.5], [0.0, 0.0], [1.0, 1.0, 1.0]])
def test_impossible_points_are_refused(row: list[float]) -> None:
    with pytest.raises(InvalidInput) as caught:
        given_points([[1.0, 1.0], row], 2, "algorithm.options.reference_points")
    assert caught.value.field == "algorithm.options.reference_points.1"
    assert caught.value.remedy
