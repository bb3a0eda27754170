"""From per-item scores to values, losses and violations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import InfeasibleCandidate
from optimizer.fitness.aggregate import ItemScores, aggregate, to_losses, violation
from optimizer.problem import ResolvedObjective
from optimizer.spec import Direction

scores = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20)


def objective(
    name: str = "task", direction: Direction = "maximise", low: float | None = None, high: float | None = None
) -> ResolvedObjective:
    return ResolvedObjective(
        name=name, metric="m", direction=direction, weight=1, at_least=low, at_most=high, items=1, data_digest="0" * 64
    )


def items(*values: float, weights: list[float] | None = None) -> ItemScores:
    return ItemScores(
        np.array(values, dtype=np.float32), None if weights is None else np.array(weights, dtype=np.float32)
    )


@given(scores)
def test_mean_is_taken_in_double_precision(values: list[float]) -> None:
    assert items(*values).mean() == pytest.approx(np.mean(np.array(values, dtype=np.float64)), rel=1e-12, abs=1e-12)


def test_mean_of_many_small_values_does_not_lose_them() -> None:
    assert ItemScores(np.full(1_000_000, 0.1, dtype=np.float32)).mean() == pytest.approx(np.float32(0.1), rel=1e-9)


@given(scores)
def test_equal_weights_change_nothing(values: list[float]) -> None:
    assert items(*values, weights=[3.0] * len(values)).mean() == pytest.approx(items(*values).mean())


def test_weights_count() -> None:
    assert items(1.0, 3.0, weights=[3.0, 1.0]).mean() == 1.5


def test_values_come_in_the_order_of_the_objectives() -> None:
    found = {"b": items(2.0), "a": items(1.0, 0.0), "unasked": items(9.0)}
    assert aggregate([objective("a"), objective("b")], found) == [0.5, 2.0]


def test_a_missing_score_makes_a_candidate_infeasible() -> None:
    with pytest.raises(InfeasibleCandidate, match="no score") as caught:
        aggregate([objective("a"), objective("b")], {"a": items(1.0)})
    assert caught.value.field == "objectives.b"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_make_a_candidate_infeasible(bad: float) -> None:
    with pytest.raises(InfeasibleCandidate, match="2 of 3 items have no finite score") as caught:
        aggregate([objective("a")], {"a": items(1.0, bad, bad)})
    assert caught.value.field == "objectives.a"


def test_losses_are_all_to_be_minimised() -> None:
    mixed = [objective("up", "maximise"), objective("down", "minimise")]
    assert to_losses(mixed, [0.8, 0.3]).tolist() == [-0.8, 0.3]


@pytest.mark.parametrize(
    ("low", "high", "value", "expected"),
    [
        (None, None, 5.0, 0.0),
        (0.5, None, 0.5, 0.0),
        (0.5, None, 0.2, 0.3),
        (None, 2.0, 2.5, 0.5),
        (0.5, 2.0, 1.0, 0.0),
        (0.5, 2.0, 3.0, 1.0),
    ],
)
def test_violation(low: float | None, high: float | None, value: float, expected: float) -> None:
    assert violation([objective(low=low, high=high)], [value]) == pytest.approx(expected)


def test_violations_add_up() -> None:
    both = [objective("a", low=1.0), objective("b", high=0.0)]
    assert violation(both, [0.75, 0.5]) == 0.75
