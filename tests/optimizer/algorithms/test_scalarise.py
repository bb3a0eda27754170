"""One number for several losses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.algorithms import Outcome
from optimizer.algorithms.scalarise import Scalarisation, Scalariser

numbers = st.floats(-10, 10)
methods = st.sampled_from(["weighted_sum", "tchebycheff"])


def outcome(index: int, *losses: float, violation: float = 0.0) -> Outcome:
    return Outcome(index, np.zeros(1), np.array(losses) if losses else None, violation)


def scalariser(seen: list[Outcome], method: Scalarisation = "weighted_sum", normalise: bool = True) -> Scalariser:
    out = Scalariser(np.ones(2), method, normalise)
    for each in seen:
        out.observe(each)
    return out


@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=20), methods, st.booleans())
def test_dominating_outcomes_rank_no_worse(
    pairs: list[tuple[float, float]], method: Scalarisation, normalise: bool
) -> None:
    outcomes = [outcome(index, *pair) for index, pair in enumerate(pairs)]
    ranks = scalariser(outcomes, method, normalise).rank(outcomes)
    assert np.isfinite(ranks).all()
    for a, first in enumerate(pairs):
        for b, second in enumerate(pairs):
            if first[0] <= second[0] and first[1] <= second[1]:
                assert ranks[a] <= ranks[b] + 1e-9 * abs(ranks[b])


def test_plain_weighted_sum() -> None:
    out = Scalariser(np.array([2.0, 1.0]), "weighted_sum", normalise=False)
    out.observe(outcome(0, 1.0, 5.0))
    ranks = out.rank([outcome(1, 3.0, 6.0), outcome(2, 1.0, 5.0)])
    assert ranks[0] - ranks[1] == pytest.approx(2 * 2.0 + 1.0)


def test_tchebycheff_prefers_the_balanced() -> None:
    """On a concave front the weighted sum knows only the ends."""
    front = [outcome(0, 0.0, 1.0), outcome(1, 0.6, 0.6), outcome(2, 1.0, 0.0)]
    assert scalariser(front, "weighted_sum").rank(front).argmin() != 1
    assert scalariser(front, "tchebycheff").rank(front).argmin() == 1


def test_scale_is_frozen_after_the_first_ranking() -> None:
    first = [outcome(index, float(index), 10.0 * index) for index in range(4)]
    out = scalariser(first)
    before = out.rank(first)
    out.observe(outcome(9, 1e6, -1e6))
    np.testing.assert_array_equal(out.rank(first), before)


def test_scale_is_provisional_below_three() -> None:
    out = scalariser([outcome(0, 0.0, 0.0), outcome(1, 1.0, 1.0)])
    pair = [outcome(0, 1.0, 0.0), outcome(1, 0.0, 1.0)]
    assert np.ptp(out.rank(pair)) == 0
    for index in range(9):
        out.observe(outcome(index, 0.0, 100.0 * index))
    assert out.rank(pair)[0] > out.rank(pair)[1], "the second objective varies more, so a step of it counts less"


def test_one_ruined_candidate_does_not_set_the_scale() -> None:
    seen = [outcome(index, 0.1 * index, 0.1 * (9 - index)) for index in range(9)]
    pair = [outcome(0, 0.2, 0.3), outcome(1, 0.3, 0.1)]
    ruined = outcome(9, 1e9, 0.5)
    assert scalariser(seen).rank(pair).argmin() == scalariser([*seen, ruined]).rank(pair).argmin() == 1


def test_failed_and_violating_come_last() -> None:
    outcomes = [
        outcome(0),
        outcome(1, 0.0, 0.0, violation=2.0),
        outcome(2, np.nan, 0.0),
        outcome(3, 5.0, 5.0),
        outcome(4, 0.0, 0.0, violation=1.0),
        outcome(5, 1.0, 1.0),
    ]
    assert scalariser(outcomes).rank(outcomes).argsort().tolist() == [5, 3, 4, 1, 0, 2]


def test_nothing_seen_and_nothing_to_compare() -> None:
    failed = [outcome(0), outcome(1)]
    assert scalariser(failed).rank(failed).tolist() == [1.0, 2.0]
    equal = [outcome(index, 1.0, 1.0) for index in range(3)]
    assert np.ptp(scalariser(equal).rank(equal)) == 0
