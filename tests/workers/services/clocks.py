"""Time for tests: real, except that waiting takes none."""

from __future__ import annotations

import threading
import time

from workers.services.pace import Clock


class Skipping:
    """A clock whose waits pass at once; ``waited`` is their sum in seconds."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._lock = threading.Lock()

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.waited += seconds

    @property
    def clock(self) -> Clock:
        return Clock(
            now=lambda: time.monotonic() + self.waited, date=lambda: time.time() + self.waited, sleep=self.sleep
        )


class Standing:
    """A clock that moves only by waiting; ``now`` may be set."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.now, date=lambda: 1e9 + self.now, sleep=self.sleep)
