"""Rate limits: a bucket of requests for each token, filled at a constant rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock

from optimizer.errors import TooManyRequests


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
