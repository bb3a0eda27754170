"""What each token may do, and the rate limit: a bucket of requests for each token, filled at a constant rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock

from pydantic import Field

from optimizer.errors import TooManyRequests
from optimizer.spec import Strict


class Limits(Strict):
    """What each token may do."""

    requests_per_minute: int = Field(default=600, ge=1, description="Requests, in the long run; as many at once.")
    evaluations: int | None = Field(
        default=10_000, ge=1, description="Evaluations of a candidate on a set, in all; null for any number."
    )
    items: int | None = Field(default=None, ge=1, description="Items of all evaluations together; null for any number.")
    in_flight: int = Field(default=8, ge=1, le=1000, description="Evaluations under way at once.")
    sessions: int = Field(default=4, ge=1, le=1000, description="Sessions that are open at once.")
    session_ttl_s: float = Field(
        default=3600, gt=0, le=30 * 86400, description="A session ends so long after its last use."
    )
    candidates: int = Field(default=10_000, ge=1, description="Materialised candidates kept in a session, the newest.")
    body_bytes: int = Field(default=16 * 1024 * 1024, ge=1024, description="Largest request body.")
    numbers: int = Field(default=100_000, ge=1, description="Most coefficients and options in the tables of a recipe.")
    nodes: int = Field(default=64, ge=1, description="Most merges in a recipe.")


class RateLimit:
    """Lets each token through so many times a minute, and as many at once after a while of silence.

    Args:
        per_minute: requests.
        clock: seconds, from any origin.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = float(per_minute)
        self._rate = per_minute / 60
        self._clock = clock
        self._left: dict[int, tuple[float, float]] = {}  # by token: requests left, as of when
        self._lock = Lock()

    def take(self, token: int) -> None:
        """Count a request; raises `TooManyRequests`, which says when the next one may come."""
        now = self._clock()
        with self._lock:
            left, since = self._left.get(token, (self._most, now))
            left = min(self._most, left + (now - since) * self._rate)
            if left < 1:
                error = TooManyRequests(
                    f"more than {self._most:g} requests a minute", remedy="wait as long as Retry-After says"
                )
                error.retry_after_s = (1 - left) / self._rate
                self._left[token] = left, now
                raise error
            self._left[token] = left - 1, now
