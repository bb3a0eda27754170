"""Contributions against the measures they belong to, as scipy and scikit-learn compute them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from sklearn.metrics import f1_score, r2_score, recall_score

from workers.evaluators import contributions
from workers.evaluators.contributions import Vector

SIZES = st.integers(2, 40)


def pairs(low: float, high: float, integers: bool = False) -> st.SearchStrategy[tuple[Vector, Vector]]:
    """Two vectors of one length; whole numbers make ties."""
    values = st.integers(int(low), int(high)).map(float) if integers else st.floats(low, high, width=32)
    return SIZES.flatmap(lambda size: st.tuples(*[arrays(np.float64, size, elements=values)] * 2))


@given(pairs(-1000, 1000))
def test_the_mean_is_pearsons_correlation(both: tuple[Vector, Vector]) -> None:
    predicted, observed = both
    found = contributions.pearson(predicted, observed)
    if np.ptp(predicted) == 0 or np.ptp(observed) == 0:
        assert np.isnan(found).all()
    elif min(np.ptp(predicted) / np.abs(predicted).max(), np.ptp(observed) / np.abs(observed).max()) > 1e-6:
        assert found.mean() == pytest.approx(stats.pearsonr(predicted, observed).statistic, abs=1e-6)


@given(pairs(-4, 4, integers=True))
def test_the_mean_is_spearmans_correlation_also_with_ties(both: tuple[Vector, Vector]) -> None:
    predicted, observed = both
    found = contributions.spearman(predicted, observed)
    if np.ptp(predicted) == 0 or np.ptp(observed) == 0:
        assert np.isnan(found).all()
    else:
        assert found.mean() == pytest.approx(stats.spearmanr(predicted, observed).statistic, abs=1e-9)


@given(pairs(-4, 4, integers=True))
def test_the_mean_is_r_squared(both: tuple[Vector, Vector]) -> None:
    predicted, observed = both
    found = contributions.determination(predicted, observed)
    if np.ptp(observed) == 0:
        assert np.isnan(found).all()
    else:
        assert found.mean() == pytest.approx(r2_score(observed, predicted), rel=1e-9, abs=1e-9)


@given(pairs(0, 5, integers=True))
def test_the_mean_is_macro_f1(both: tuple[Vector, Vector]) -> None:
    predicted, observed = (values.astype(np.int64) for values in both)
    found = contributions.macro_f1(predicted, observed, 6)
    assert found.mean() == pytest.approx(f1_score(observed, predicted, average="macro", zero_division=0), abs=1e-12)


@given(pairs(0, 5, integers=True))
def test_weights_balance_the_classes(both: tuple[Vector, Vector]) -> None:
    predicted, observed = (values.astype(np.int64) for values in both)
    found = contributions.balanced_weights(observed)
    expected = recall_score(observed, predicted, labels=np.unique(observed), average="macro")
    assert np.average(predicted == observed, weights=found) == pytest.approx(expected, abs=1e-12)
    assert found.mean() == pytest.approx(1.0)


@given(SIZES.flatmap(lambda n: arrays(np.int64, (3, n, 2), elements=st.integers(0, 50))))
def test_the_mean_is_the_mean_overlap_of_the_classes_that_occur(areas: np.ndarray) -> None:
    shared = areas.min(axis=2).astype(float)
    united = areas.max(axis=2).astype(float)
    totals = united.sum(axis=1)
    found = contributions.mean_overlap(shared, united)
    expected = [a / b for a, b in zip(shared.sum(axis=1), totals, strict=True) if b]
    assert found.mean() == pytest.approx(np.mean(expected) if expected else 1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_leave_nothing(bad: float) -> None:
    values, others = np.array([0.0, 1.0, bad]), np.array([0.0, 1.0, 2.0])
    with np.errstate(invalid="ignore"):
        assert np.isnan(contributions.pearson(values, others)).all()
        assert np.isnan(contributions.spearman(values, others)).all()
        assert not np.isfinite(contributions.determination(values, others)[2])
    shared = np.array([[1.0, bad]])
    assert not np.isfinite(contributions.mean_overlap(shared, np.array([[2.0, np.nan]]))).any()
