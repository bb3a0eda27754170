"""Expected improvements, against sampling and in the tails."""

from __future__ import annotations

import numpy as np
import pytest

from optimizer.pareto import hypervolume
from optimizer.surrogates.acquisition import Boxes, Scalarised, _log_h, free_boxes, log_improvement, tchebycheff


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_expected_hypervolume_improvement_is_that_of_many_draws(objectives: int) -> None:
    random = np.random.default_rng(objectives)
    front, reference = random.random((6, objectives)), np.full(objectives, 1.2)
    mean, std = 0.2 + 0.6 * random.random((3, objectives)), 0.2 + 0.2 * random.random((3, objectives))
    exact = np.exp(log_improvement(mean, std, free_boxes(front, reference)))
    before = hypervolume(front, reference)
    for k in range(3):
        draws = mean[k] + std[k] * random.standard_normal((2000, objectives))
        gains = np.array([hypervolume(np.vstack([front, draw]), reference) - before for draw in draws])
        assert exact[k] == pytest.approx(gains.mean(), abs=5 * gains.std() / np.sqrt(len(gains)))


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_boxes_are_disjoint_and_fill_what_is_free(objectives: int) -> None:
    random = np.random.default_rng(objectives)
    front, reference = random.random((7, objectives)), np.ones(objectives)
    boxes = free_boxes(front, reference)
    points = random.random((400, objectives))
    inside = ((points[:, None] > boxes.low) & (points[:, None] <= boxes.high)).all(axis=2).sum(axis=1)
    beaten = np.array([bool((front <= point).all(axis=1).sum()) for point in points])
    np.testing.assert_array_equal(inside, np.where(beaten, 0, 1))


def test_logarithms_go_on_where_the_improvement_is_zero_in_floating_point() -> None:
    mean = np.array([[10.0], [50.0], [1e3], [1e5]])
    values = log_improvement(mean, np.full((4, 1), 0.5), Boxes(np.array([[-np.inf]]), np.array([[0.0]])))
    assert np.isfinite(values).all() and (np.diff(values) < 0).all()
    around = _log_h(np.array([[-1.0 - 1e-9, -1.0 + 1e-9], [-1e3 - 1e-3, -1e3 + 1e-3]]))
    np.testing.assert_allclose(around[:, 0], around[:, 1], rtol=1e-5)


def test_scalarised_improvement_prefers_what_is_better() -> None:
    weights = np.array([0.5, 0.2, 0.2, 0.1])
    score = Scalarised(weights, np.zeros(4), best=float(tchebycheff(np.full(4, 0.5), weights)))
    mean, std = np.array([[0.1] * 4, [0.4] * 4, [0.9] * 4, [5.0] * 4]), np.full((4, 4), 0.1)
    values = score(mean, std)
    assert np.isfinite(values).all() and (np.diff(values) < 0).all()
