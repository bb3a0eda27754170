"""Rates, waits and breakers, on clocks of their own."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.errors import JobPaused
from optimizer.fitness.cost import Cost
from tests.workers.services.clocks import Standing
from workers.services.breaker import Breaker
from workers.services.meter import Meter
from workers.services.options import Limits, Prices
from workers.services.pace import Backoff, Pace, TokenBucket, retry_after_s


@settings(max_examples=50, deadline=None)
@given(st.floats(1, 6000), st.lists(st.floats(0, 50), min_size=1, max_size=60))
def test_a_bucket_never_lets_more_through_than_its_rate(per_minute: float, amounts: list[float]) -> None:
    standing = Standing()
    bucket = TokenBucket(per_minute, standing.clock)
    room = max(1.0, per_minute / 60)
    taken = 0.0
    for amount in amounts:
        standing.sleep(bucket.wait_s(amount))
        assert bucket.wait_s(amount) <= 1e-6
        bucket.take(amount)
        taken += amount
        # Within the rate and a second's worth, but for the one that is larger than that by itself.
        assert taken <= per_minute / 60 * standing.now + max(room, amount) + 1e-6


def test_requests_and_tokens_both_count() -> None:
    standing = Standing()
    pace = Pace(Limits(requests_per_minute=60, tokens_per_minute=600), standing.clock)
    assert pace.enter(5) == 0  # of 1 request and 10 tokens at once
    assert pace.enter(5) == pytest.approx(1), "another request"
    standing.now = 1.0
    assert pace.enter(100) == 0  # 10 tokens were there again
    standing.now = 3.0
    assert pace.enter(5) == pytest.approx(7.5), "70 tokens are owed, and 5 wanted"
    pace.settle(100, 30)  # it took less than was thought
    assert pace.enter(0) == 0


def test_nobody_goes_before_the_service_wants_it() -> None:
    standing = Standing()
    pace = Pace(Limits(), standing.clock)
    pace.hold(12)
    pace.hold(3)
    assert pace.enter(1) == pytest.approx(12)
    standing.now = 12
    assert pace.enter(1) == 0


def test_backoff_has_full_jitter() -> None:
    backoff = Backoff(0.5, 8, random.Random(0))
    for tries, bound in ((1, 0.5), (2, 1), (3, 2), (5, 8), (50, 8), (10**9, 8)):
        waits = [backoff.wait_s(tries) for _ in range(400)]
        assert 0 <= min(waits) < 0.05 * bound
        assert 0.95 * bound < max(waits) <= bound
        assert sum(waits) / 400 == pytest.approx(bound / 2, rel=0.15)
    one, two = (Backoff(0.5, 8, random.Random(7)) for _ in range(2))
    assert [one.wait_s(3) for _ in range(5)] == [two.wait_s(3) for _ in range(5)]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("0", 0),
        (" 17 ", 17),
        ("9" * 5000, 10**9),
        (format_datetime(datetime.fromtimestamp(1e9 + 90, UTC), usegmt=True), 90),
        (format_datetime(datetime.fromtimestamp(1e9 + 90, UTC)), 90),
        ("Sun, 09 Sep 2001 01:46:30 -0000", 0),
        ("-3", None),
        ("1.5", None),
        ("٣", None),
        ("soon", None),
        ("", None),
        ("Mon, 99 Foo 2001", None),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert retry_after_s(header, Standing().clock) == (None if seconds is None else pytest.approx(seconds))


def test_a_breaker_opens_probes_and_closes() -> None:
    standing = Standing()
    breaker = Breaker(3, cooldown_s=30, clock=standing.clock)
    assert breaker.failed("a") is None
    assert breaker.failed("b") is None
    breaker.succeeded()
    assert [breaker.failed(text) for text in "cde"] == [None, None, "e"]
    assert breaker.blocked() == "e"
    standing.now = 31
    assert breaker.blocked() is None, "one may probe"
    assert breaker.blocked() == "e", "the others wait"
    assert breaker.failed("f") == "f"
    assert breaker.blocked() == "f"
    standing.now = 62
    assert breaker.blocked() is None
    breaker.succeeded()
    assert breaker.blocked() is None
    assert breaker.failed("g") is None
    assert breaker.failed("gone", at_once=True) == "gone"


def test_a_meter_stops_before_a_budget_is_exceeded() -> None:
    meter = Meter()
    meter.allow(Cost(requests=3, tokens=100, money=float("inf")))
    meter.reserve(Cost(requests=1, tokens=40))
    meter.reserve(Cost(requests=1, tokens=40))
    with pytest.raises(JobPaused, match="the budget of tokens is spent") as caught:
        meter.reserve(Cost(requests=1, tokens=40))
    assert caught.value.field == "budget.tokens"
    meter.settle(Cost(requests=1, tokens=40), Cost(requests=1, tokens=10))  # it took less
    meter.reserve(Cost(requests=1, tokens=40))
    with pytest.raises(JobPaused, match="requests"):
        meter.reserve(Cost(requests=1))
    assert meter.spent == Cost(requests=1, tokens=10)
    meter.settle(Cost(requests=1, tokens=40), Cost(requests=1, tokens=40))
    meter.settle(Cost(requests=1, tokens=40), Cost(requests=1, tokens=40))
    assert meter.take() == Cost(requests=3, tokens=90)
    assert meter.take() == Cost()
    with pytest.raises(JobPaused, match="requests"):
        meter.reserve(Cost(requests=1))  # what was taken is spent all the same
    meter.allow(None)
    meter.reserve(Cost(requests=10**6))


def test_prices() -> None:
    prices = Prices(per_request=0.01, per_million_input_tokens=2, per_million_output_tokens=8)
    assert prices.cost(1000, 500).money == pytest.approx(0.01 + 0.002 + 0.004)
    assert prices.cost(1000, 500) == Cost(tokens=1500, requests=1, money=prices.cost(1000, 500).money)


def test_workers_share_the_limits_of_a_job() -> None:
    limits = Limits(concurrency=8, requests_per_minute=60, tokens_per_minute=None).shared(3)
    assert (limits.concurrency, limits.requests_per_minute, limits.tokens_per_minute) == (2, 20, None)
    assert Limits(concurrency=1).shared(5).concurrency == 1
