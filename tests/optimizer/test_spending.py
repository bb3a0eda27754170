"""Budgets in requests, tokens and money are divided and never exceeded."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from optimizer.fitness.cost import Cost
from optimizer.spec import Budget
from optimizer.spending import Spending


def budget(**parts: float) -> Budget:
    return Budget.model_validate({"evaluations": 10} | parts)


def test_without_budgets_nothing_is_bounded() -> None:
    spending = Spending(budget(), Cost(requests=1e9), Cost(requests=5))
    assert spending.exhausted is None
    assert spending.may_start(1)
    assert spending.start(0, 4) is None
    assert spending.may_start(1)


def test_shares_of_what_is_left() -> None:
    spending = Spending(budget(requests=100, money=8), Cost(requests=20), Cost(requests=10, money=1))
    assert spending.start(0, 4) == Cost(requests=20, money=2, tokens=float("inf"))
    assert spending.start(1, 4) == Cost(requests=20, money=2, tokens=float("inf"))
    spending.end(0, Cost(requests=5, money=2))
    # 100 − 20 − 5 − 20 given, between the three others that may be under way.
    first = spending.start(2, 4)
    assert first is not None
    assert round(first.requests, 6) == round(55 / 3, 6)
    assert spending.exhausted is None


def test_what_is_not_enough_for_two_goes_to_one() -> None:
    spending = Spending(budget(requests=15), estimate=Cost(requests=10))
    assert spending.may_start(4)
    assert spending.start(0, 4) == Cost(requests=15, tokens=float("inf"), money=float("inf"))
    assert not spending.may_start(4), "nothing is left until it is back"
    spending.end(0, Cost(requests=9))
    assert spending.start(1, 4) == Cost(requests=6, tokens=float("inf"), money=float("inf"))
    spending.end(1, Cost(requests=6))
    assert spending.exhausted == "the budget of 15 requests is spent"


@given(st.integers(1, 6), st.floats(1, 500), st.floats(0, 50), st.integers(0, 1000))
def test_whoever_keeps_to_a_share_exceeds_nothing(most: int, bound: float, estimate: float, seed: int) -> None:
    rng = random.Random(seed)
    spending = Spending(budget(tokens=bound), estimate=Cost(tokens=estimate))
    under_way: dict[int, Cost] = {}
    spent = 0.0
    for index in range(60):
        if spending.exhausted is None and len(under_way) < most and spending.may_start(most):
            allowance = spending.start(index, most)
            assert allowance is not None
            under_way[index] = allowance
        elif under_way:
            done = rng.choice(list(under_way))
            cost = Cost(tokens=under_way.pop(done).tokens * rng.choice([0, 0.5, 1]))
            spent += cost.tokens
            spending.end(done, cost)
        assert spent + sum(one.tokens for one in under_way.values()) <= bound * (1 + 1e-6)
