"""The flattest quadratic through points: what it gets right, and where its minimum lies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.surrogates.local_model import LocalModel, unknown

DIMS = st.integers(1, 6)
SEEDS = st.integers(0, 2**31)


@given(DIMS, SEEDS)
def test_with_points_enough_it_is_the_quadratic(dim: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    root, centre = random.standard_normal((dim, dim)), random.uniform(-0.4, 0.4, dim)
    hessian = root @ root.T + np.eye(dim)
    steps = random.uniform(-1, 1, (4 * (dim + 1) * (dim + 2), dim))
    away = steps - centre
    model = LocalModel(steps, np.einsum("ni,ij,nj->n", away, hessian, away))
    box = np.ones(dim)
    assert model.minimum(10.0, -box, box) == pytest.approx(centre, abs=0.05)


@given(DIMS, SEEDS, st.floats(0.05, 2.0))
def test_the_minimum_keeps_the_radius_and_the_bounds(dim: int, seed: int, radius: float) -> None:
    random = np.random.default_rng(seed)
    steps, values = random.standard_normal((2 * dim + 1, dim)), random.standard_normal(2 * dim + 1)
    low, high = -random.uniform(0, 1, dim), random.uniform(0, 1, dim)
    step = LocalModel(steps, values).minimum(radius, low, high)
    assert np.linalg.norm(step) <= 1.05 * radius + 1e-9
    assert (step >= low - 1e-12).all()
    assert (step <= high + 1e-12).all()


@given(DIMS, SEEDS, st.floats(-100, 100), st.floats(0.01, 100))
def test_neither_the_level_nor_the_scale_of_the_values_matters(dim: int, seed: int, level: float, scale: float) -> None:
    random = np.random.default_rng(seed)
    steps, values = random.standard_normal((dim + 2, dim)), random.standard_normal(dim + 2)
    box = np.full(dim, 0.5)
    one, other = (LocalModel(steps, found).minimum(1.0, -box, box) for found in (values, level + scale * values))
    assert other == pytest.approx(one, abs=1e-3)


def test_directions_nothing_is_known_of_are_left_alone() -> None:
    steps = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    step = LocalModel(steps, np.array([0.0, 1.0, -1.0])).minimum(1.0, np.full(3, -1.0), np.full(3, 1.0))
    assert step[2] == pytest.approx(0, abs=1e-9)
    assert step[0] < -0.4
    assert step[1] > 0.4


@given(DIMS, SEEDS)
def test_what_is_unknown_of_axes(dim: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    assert (unknown(np.empty((0, dim)), dim) == 1).all()
    assert (unknown(np.zeros((1, dim)), dim) == 1).all()
    axes = np.eye(dim)[: dim // 2] * random.uniform(0.1, 9)
    left = unknown(axes, dim)
    assert (left[: dim // 2] < 0.02).all()
    assert (left[dim // 2 :] > 0.99).all()
    assert (unknown(np.eye(dim) * 0.3, dim) < 0.02).all()
