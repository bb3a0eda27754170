"""Which candidate is measured on how many items: Hyperband's brackets, promoted one by one.

A bracket begins with many candidates on few items and promotes the best one in eta of each rung to eta times as many
(successive halving); brackets differ in how few they begin with (Hyperband; Li et al. 2018, arXiv:1603.06560). A promotion
is made as soon as a rung allows it (Li et al. 2020, arXiv:1810.05934), so that nobody waits for a rung to fill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


def rungs(full: int, smallest: int, eta: int) -> tuple[int, ...]:
    """Return the numbers of items of the rungs, fewest first: ``full`` divided by eta as often as ``smallest`` allows."""
    out = [full]
    while out[0] / eta >= smallest:
        out.insert(0, round(full / eta ** len(out)))
    return tuple(out)


@dataclass
class Entry:
    """A candidate of a bracket.

    Attributes:
        key: whatever its owner knows it by.
        rung: where it was measured last, or is being measured.
        done: whether the outcome is there.
        promoted: whether it was measured on more items since.
    """

    key: int
    rung: int
    done: bool = False
    promoted: bool = False


@dataclass
class Bracket:
    """Successive halving from one of the rungs on.

    Attributes:
        first: the rung it begins with.
        entries: candidates on the rungs, in the order of proposing; a promoted one stands on both rungs.
    """

    first: int
    entries: list[Entry] = field(default_factory=list)


Rank = Callable[[Sequence[int]], Sequence[int]]
"""From keys of candidates measured on the same items, to the places of those that may go on, best first."""


class Hyperband:
    """Says what to measure next.

    Brackets take turns so that each costs about as many items: new candidates go to the one that has spent least.

    Args:
        sizes: numbers of items of the rungs, fewest first.
        eta: one in so many candidates is promoted.
        brackets: how many of them there are, at most as many as rungs; one is successive halving.
    """

    def __init__(self, sizes: Sequence[int], eta: int, brackets: int | None = None) -> None:
        self._sizes = tuple(sizes)
        self._eta = eta
        self._brackets = [Bracket(first) for first in range(len(self._sizes))][:brackets]
        self._spent = [0] * len(self._brackets)
        self._entries: dict[int, tuple[Bracket, Entry]] = {}

    def next(self, rank: Rank) -> tuple[int | None, int, int]:
        """Return what to measure: the key of a candidate to promote or None for a new one, its bracket, and the rung."""
        for number, bracket in enumerate(self._brackets):
            found = self._promotable(bracket, rank)
            if found is not None:
                return found.key, number, found.rung + 1
        number = min(range(len(self._brackets)), key=lambda each: (self._spent[each], each))
        return None, number, self._brackets[number].first

    def begin(self, key: int, bracket: int, rung: int, promoted: int | None) -> None:
        """Take in that the candidate ``key`` is measured now, promoted from the candidate of that key or new."""
        if promoted is not None:
            self._entries[promoted][1].promoted = True
        entry = Entry(key, rung)
        self._brackets[bracket].entries.append(entry)
        self._entries[key] = self._brackets[bracket], entry
        self._spent[bracket] += self._sizes[rung]

    def finish(self, key: int) -> None:
        """Take in that an outcome is there."""
        if key in self._entries:
            self._entries[key][1].done = True

    def _promotable(self, bracket: Bracket, rank: Rank) -> Entry | None:
        """The best that may go on, from the highest rung that lets one go."""
        for rung in range(len(self._sizes) - 2, bracket.first - 1, -1):
            done = [entry for entry in bracket.entries if entry.rung == rung and entry.done]
            allowed = len(done) // self._eta
            if allowed <= sum(entry.promoted for entry in done):
                continue
            order = rank([entry.key for entry in done])
            waiting = [done[place] for place in order[:allowed] if not done[place].promoted]
            if waiting:
                return waiting[0]
        return None
