"""In which order outcomes are told."""

from __future__ import annotations

import heapq
from collections import deque


class Queue:
    """Decides which outcome is told next; a function of the log alone.

    In order: that of the lowest index not told yet, once it is there. Otherwise as they arrived; a duplicate follows its
    original at once, or is told before anything else if that was told already.

    Attributes:
        told: how many have been told.
    """

    def __init__(self, *, in_order: bool) -> None:
        self.told = 0
        self._in_order = in_order
        self._sources: list[int] = []
        self._there: set[int] = set()
        self._arrived: deque[int] = deque()
        self._done: set[int] = set()
        self._echoes: list[int] = []
        self._followers: dict[int, list[int]] = {}

    def added(self, index: int, original: int | None) -> None:
        """A candidate was recorded, ``original`` being whose outcome it shares, if it is a duplicate."""
        self._sources.append(index if original is None else original)
        if original is None or self._in_order:
            return
        if original in self._done:
            heapq.heappush(self._echoes, index)
        else:
            self._followers.setdefault(original, []).append(index)

    def arrived(self, index: int) -> None:
        """The outcome of a candidate was recorded; in a replay also of one that is yet to be added."""
        self._there.add(index)
        if not self._in_order:
            self._arrived.append(index)

    def next(self) -> int | None:
        """Return whose outcome is told next, and count it as told; None if it is not there yet."""
        found = self._lowest() if self._in_order else self._first()
        self.told += found is not None
        return found

    def _lowest(self) -> int | None:
        if self.told < len(self._sources) and self._sources[self.told] in self._there:
            return self.told
        return None

    def _first(self) -> int | None:
        if self._echoes:
            return heapq.heappop(self._echoes)
        if not self._arrived or self._arrived[0] >= len(self._sources):
            return None
        index = self._arrived.popleft()
        self._done.add(index)
        for follower in self._followers.pop(index, ()):
            heapq.heappush(self._echoes, follower)
        return index
