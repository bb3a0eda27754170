"""When the next request may go: token buckets, and times before which a service does not want to hear from us."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from workers.services.options import Limits


@dataclass(frozen=True)
class Clock:
    """Time, so that tests can have their own.

    Attributes:
        now: seconds that only grow.
        date: seconds since 1970, for what services write as dates.
        sleep: waits for so many seconds.
    """

    now: Callable[[], float] = time.monotonic
    date: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep


SYSTEM = Clock()


class TokenBucket:
    """Lets so much through a minute on average, and a second's worth at once.

    More than that may be taken once it is full: the next one then waits until the debt is paid off.

    Args:
        per_minute: how much.
        clock: what time it is.
    """

    def __init__(self, per_minute: float, clock: Clock = SYSTEM) -> None:
        self._rate = per_minute / 60
        self._room = max(1.0, self._rate)
        self._level = self._room
        self._clock = clock
        self._at = clock.now()

    def wait_s(self, amount: float) -> float:
        """Return how long to wait until so much may be taken, in seconds."""
        self._fill()
        missing = min(amount, self._room) - self._level
        return missing / self._rate if missing > 1e-9 else 0.0

    def take(self, amount: float) -> None:
        """Take so much, or give it back where it is negative."""
        self._fill()
        self._level = min(self._room, self._level - amount)

    def _fill(self) -> None:
        now = self._clock.now()
        self._level = min(self._room, self._level + (now - self._at) * self._rate)
        self._at = now


class Pace:
    """Decides for all threads that ask one service when the next may go.

    Args:
        limits: rates of requests and of tokens.
        clock: what time it is.
    """

    def __init__(self, limits: Limits, clock: Clock = SYSTEM) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._not_before = clock.now()
        rates = limits.requests_per_minute, limits.tokens_per_minute
        self._requests, self._tokens = (None if rate is None else TokenBucket(rate, clock) for rate in rates)

    def enter(self, tokens: float) -> float:
        """Take a request's part of the rates and return 0; or take nothing and return the seconds to wait first."""
        with self._lock:
            amounts = ((self._requests, 1.0), (self._tokens, tokens))
            waits = [bucket.wait_s(amount) for bucket, amount in amounts if bucket is not None]
            wait = max(0.0, self._not_before - self._clock.now(), *waits)
            if wait <= 0:
                for bucket, amount in amounts:
                    if bucket is not None:
                        bucket.take(amount)
            return wait

    def settle(self, estimated: float, taken: float) -> None:
        """Replace the tokens that were thought by those that it took."""
        with self._lock:
            if self._tokens is not None:
                self._tokens.take(taken - estimated)

    def hold(self, seconds: float) -> None:
        """Let nobody go for so long: the service asked for it."""
        with self._lock:
            self._not_before = max(self._not_before, self._clock.now() + seconds)


@dataclass
class Backoff:
    """Waits that grow exponentially, with full jitter: uniform between 0 and the bound, so that callers spread out.

    Source: Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.

    Attributes:
        first_s: bound of the first wait; it doubles with each.
        most_s: bound of all of them.
        rng: its own generator.
    """

    first_s: float
    most_s: float
    rng: random.Random = field(default_factory=random.Random)

    def wait_s(self, tries: int) -> float:
        """Return how long to wait after so many tries, at least 1."""
        return self.rng.uniform(0.0, min(self.most_s, self.first_s * 2.0 ** min(tries - 1, 60)))


def retry_after_s(header: str | None, clock: Clock = SYSTEM) -> float | None:
    """Return what a Retry-After header asks for, in seconds from now; None where there is none that can be read."""
    if header is None:
        return None
    text = header.strip()
    try:
        if text.isascii() and text.isdigit():
            return float(min(int(text[:12]), 10**9))
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    known = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return max(0.0, (known - datetime.fromtimestamp(clock.date(), UTC)).total_seconds())
