"""Bootstrap intervals: how often they hold the truth, and what follows from two of them."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap as reference

from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.intervals import Interval, bootstrap, overfitted
from optimizer.spec import Direction


def scores(values: object, weights: object = None) -> ItemScores:
    return ItemScores(
        np.asarray(values, dtype=np.float32), None if weights is None else np.asarray(weights, dtype=np.float32)
    )


def test_like_scipys() -> None:
    values = np.random.default_rng(0).exponential(size=200).astype(np.float32)
    found = bootstrap(scores(values), [1], draws=20_000)
    other = reference(
        (values,), np.mean, vectorized=True, n_resamples=20_000, rng=np.random.default_rng(1), method="BCa"
    )
    assert (found.low, found.high) == pytest.approx(tuple(other.confidence_interval), rel=0.01)


@pytest.mark.parametrize("skewed", [False, True])
def test_the_interval_holds_the_mean_about_as_often_as_it_says(skewed: bool) -> None:
    random = np.random.default_rng(3)
    held = 0
    for number in range(300):
        values = random.exponential(size=80) if skewed else random.random(80) < 0.7
        found = bootstrap(scores(values), [number], draws=500)
        held += found.low <= (1.0 if skewed else 0.7) <= found.high
    assert 0.9 <= held / 300 <= 0.985


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_the_interval_is_around_its_value_and_repeats(values: list[float], seed: int) -> None:
    found = bootstrap(scores(values), [seed], draws=200)
    assert min(values) - 1e-3 <= found.low <= found.high <= max(values) + 1e-3
    assert astuple(found) == astuple(bootstrap(scores(values), [seed], draws=200))


def test_weights_count() -> None:
    values = np.array([0.0, 1.0] * 20)
    heavy = bootstrap(scores(values, np.where(values > 0, 9.0, 1.0)), [0])
    assert heavy.value == pytest.approx(0.9)
    assert heavy.low < 0.9 < heavy.high < 1
    assert bootstrap(scores([0.0, 1.0], [0.0, 1.0]), [0]).value == 1


def test_items_that_are_alike_leave_no_width() -> None:
    assert bootstrap(scores([0.5]), [0]) == Interval(0.5, 0.5, 0.5, 1)


@pytest.mark.parametrize(
    ("test", "direction", "worse"),
    [
        (Interval(0.6, 0.55, 0.65, 9), "maximise", True),
        (Interval(0.7, 0.65, 0.76, 9), "maximise", False),
        (Interval(0.9, 0.85, 0.95, 9), "maximise", False),
        (Interval(0.9, 0.86, 0.95, 9), "minimise", True),
        (Interval(0.6, 0.55, 0.65, 9), "minimise", False),
    ],
)
def test_overfitted_is_worse_beyond_both_intervals(test: Interval, direction: Direction, worse: bool) -> None:
    assert overfitted(Interval(0.8, 0.75, 0.85, 9), test, direction) is worse
