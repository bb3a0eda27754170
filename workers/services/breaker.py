"""A circuit breaker: once a service fails too often in a row, nobody asks it until one probe has been answered."""

from __future__ import annotations

import threading

from workers.services.pace import SYSTEM, Clock


class Breaker:
    """Counts failures in a row, over all threads that ask one service.

    Closed, everybody may ask. It opens after ``failures`` failures in a row, or at once when told so. ``cooldown_s`` later
    one request may probe: its success closes the breaker, its failure opens it anew.

    Args:
        failures: in a row that open it.
        cooldown_s: how long nobody may ask.
        clock: what time it is.
    """

    def __init__(self, failures: int, cooldown_s: float = 30.0, clock: Clock = SYSTEM) -> None:
        self._failures = failures
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._lock = threading.Lock()
        self._count = 0
        self._reason: str | None = None
        self._opened = 0.0

    def blocked(self) -> str | None:
        """Return why nobody may ask now, or None: then the caller may, and must say how it went."""
        with self._lock:
            if self._reason is None:
                return None
            if self._clock.now() - self._opened < self._cooldown_s:
                return self._reason
            self._opened = self._clock.now()  # the caller probes; the others go on waiting
            return None

    def succeeded(self) -> None:
        """Close it."""
        with self._lock:
            self._count, self._reason = 0, None

    def failed(self, reason: str, *, at_once: bool = False) -> str | None:
        """Count a failure; return the reason if the breaker is open now."""
        with self._lock:
            self._count += 1
            if at_once or self._count >= self._failures or self._reason is not None:
                self._reason, self._opened = reason, self._clock.now()
            return self._reason
