"""Dominance, fronts, ranks, crowding and hypervolume against the plainest possible computation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.pareto import (
    Losses,
    crowding_distance,
    dominates,
    front_mask,
    hypervolume,
    hypervolume_contributions,
    nondominated_ranks,
    update_front,
)


@st.composite
def loss_tables(draw: st.DrawFn, max_rows: int = 14, max_columns: int = 4) -> Losses:
    """Few distinct values, so that ties and equal rows occur."""
    columns = draw(st.integers(1, max_columns))
    rows = draw(st.lists(st.lists(st.integers(0, 5), min_size=columns, max_size=columns), max_size=max_rows))
    return np.array(rows, dtype=np.float64).reshape(len(rows), columns)


def brute_front(losses: Losses) -> list[bool]:
    return [not any(dominates(other, row) for other in losses) for row in losses]


@given(loss_tables())
def test_front_is_what_nothing_dominates(losses: Losses) -> None:
    assert front_mask(losses).tolist() == brute_front(losses)


def test_dominance() -> None:
    assert dominates(np.array([1.0, 2.0]), np.array([1.0, 3.0]))
    assert not dominates(np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    assert not dominates(np.array([0.0, 2.0]), np.array([1.0, 1.0]))


@given(loss_tables(), st.integers(0, 13))
def test_rows_with_nan_are_never_on_the_front(losses: Losses, place: int) -> None:
    assert not front_mask(np.full((2, 2), np.nan)).any()
    if not len(losses):
        return
    place %= len(losses)
    losses[place, 0] = np.nan
    mask = front_mask(losses)
    assert not mask[place]
    rest = np.delete(losses, place, axis=0)
    assert np.delete(mask, place).tolist() == brute_front(rest)


@given(loss_tables())
def test_front_grown_one_by_one_is_the_front_of_all(losses: Losses) -> None:
    front = np.empty((0, losses.shape[1]))
    for row in losses:
        joins, pushed_out = update_front(front, row)
        assert pushed_out.shape == (len(front),)
        front = front[~pushed_out]
        if joins:
            front = np.vstack([front, row])
    expected = losses[front_mask(losses)]
    assert sorted(front.tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_unusable_losses_do_not_join(value: float) -> None:
    joins, pushed_out = update_front(np.array([[5.0, 5.0]]), np.array([0.0, value]))
    assert not joins
    assert pushed_out.tolist() == [False]


@given(loss_tables())
def test_ranks_peel_one_front_after_the_other(losses: Losses) -> None:
    ranks = nondominated_ranks(losses)
    left = np.arange(len(losses))
    for rank in range(int(ranks.max(initial=-1)) + 1):
        on_front = front_mask(losses[left])
        assert ranks[left[on_front]].tolist() == [rank] * int(on_front.sum())
        left = left[~on_front]
    assert not len(left)


@given(loss_tables())
def test_crowding_adds_up_the_gaps_to_the_neighbours(losses: Losses) -> None:
    # Distinct values in each column, or the neighbours depend on how ties are broken.
    losses = losses + np.arange(len(losses))[:, None] * 1e-3
    for row, distance in zip(losses, crowding_distance(losses), strict=True):
        expected = 0.0
        for column in range(losses.shape[1]):
            values = losses[:, column]
            below, above = values[values < row[column]], values[values > row[column]]
            if not len(below) or not len(above):
                expected = np.inf
                break
            expected += (above.min() - below.max()) / (values.max() - values.min())
        assert distance == pytest.approx(expected)


def test_crowding_of_equal_rows_is_finite_inside() -> None:
    assert crowding_distance(np.ones((4, 2))).tolist() == [np.inf, 0.0, 0.0, np.inf]
    assert crowding_distance(np.empty((0, 2))).shape == (0,)


def inclusion_exclusion(losses: Losses, reference: Losses) -> float:
    inside = [row for row in losses if (row < reference).all()]
    return sum(
        (-1.0) ** (size + 1) * float(np.prod(reference - np.max(chosen, axis=0)))
        for size in range(1, len(inside) + 1)
        for chosen in itertools.combinations(inside, size)
    )


@given(loss_tables(max_rows=7))
def test_hypervolume_by_inclusion_and_exclusion(losses: Losses) -> None:
    reference = np.full(losses.shape[1], 4.5)
    assert hypervolume(losses, reference) == pytest.approx(inclusion_exclusion(losses, reference))


@pytest.mark.parametrize("columns", [2, 3, 4])
def test_hypervolume_by_throwing_darts(columns: int) -> None:
    random = np.random.Generator(np.random.PCG64(columns))
    losses, darts = random.random((40, columns)), random.random((100_000, columns))
    hit = np.zeros(len(darts), dtype=bool)
    for row in losses:
        hit |= (row <= darts).all(axis=1)
    assert hypervolume(losses, np.ones(columns)) == pytest.approx(hit.mean(), abs=0.01)


@given(loss_tables(), st.integers(0, 5))
def test_hypervolume_never_shrinks(losses: Losses, value: int) -> None:
    reference = np.full(losses.shape[1], 5.5)
    more = np.vstack([losses, np.full(losses.shape[1], float(value))])
    assert hypervolume(more, reference) >= hypervolume(losses, reference) - 1e-9


def test_hypervolume_of_nothing() -> None:
    assert hypervolume(np.empty((0, 2)), np.ones(2)) == 0.0
    assert hypervolume(np.array([[2.0, 0.0]]), np.ones(2)) == 0.0
    assert hypervolume(np.array([[0.25]]), np.ones(1)) == 0.75


def exclusive(losses: Losses, reference: Losses) -> list[float]:
    whole = hypervolume(losses, reference)
    return [whole - hypervolume(np.delete(losses, place, axis=0), reference) for place in range(len(losses))]


@given(loss_tables(max_rows=9))
def test_contributions_are_what_is_lost_without_a_row(losses: Losses) -> None:
    """Also with ties, dominated rows, equal rows (which add nothing alone) and rows beyond the reference."""
    reference = np.full(losses.shape[1], 4.5)
    random = np.random.Generator(np.random.PCG64(0))
    found = hypervolume_contributions(losses, reference, random)
    np.testing.assert_allclose(found, exclusive(losses, reference), atol=1e-9)


def test_contributions_of_random_fronts() -> None:
    random = np.random.Generator(np.random.PCG64(1))
    for columns, rows in ((2, 60), (3, 25), (4, 12)):
        losses = random.random((rows, columns))
        expected = exclusive(losses, np.ones(columns))
        np.testing.assert_allclose(hypervolume_contributions(losses, np.ones(columns), random), expected, atol=1e-12)


def test_exact_contributions_draw_nothing() -> None:
    random = np.random.Generator(np.random.PCG64(2))
    before = random.bit_generator.state
    hypervolume_contributions(np.eye(3), np.full(3, 2.0), random)
    assert random.bit_generator.state == before


def test_contributions_by_throwing_darts() -> None:
    """Of 30 points in six objectives, too many for the grid; compared with those of a few, of which it is exact."""
    random = np.random.Generator(np.random.PCG64(3))
    few = random.random((8, 6)) * 0.5
    exact = hypervolume_contributions(few, np.ones(6), random)
    hidden = np.full((22, 6), 0.999)  # these add nothing, but make the grid too large
    estimate = hypervolume_contributions(np.vstack([few, hidden]), np.ones(6), random)
    np.testing.assert_allclose(estimate[:8], exact, atol=0.02 * float(np.prod(1 - few.min(axis=0))))
    assert (estimate[8:] < 1e-3).all()
