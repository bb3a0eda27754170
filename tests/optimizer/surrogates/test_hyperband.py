"""Rungs, brackets and promotions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from optimizer.surrogates.hyperband import Hyperband, rungs


@pytest.mark.parametrize(
    ("full", "smallest", "eta", "expected"),
    [
        (1000, 100, 3, (111, 333, 1000)),
        (100, 100, 3, (100,)),
        (900, 100, 3, (100, 300, 900)),
        (1, 100, 3, (1,)),
        (8, 1, 2, (1, 2, 4, 8)),
    ],
)
def test_rungs(full: int, smallest: int, eta: int, expected: tuple[int, ...]) -> None:
    assert rungs(full, smallest, eta) == expected


def by_key(keys: Sequence[int]) -> list[int]:
    return sorted(range(len(keys)), key=lambda place: keys[place])


def play(halving: Hyperband, count: int) -> list[tuple[int, int | None, int]]:
    out = []
    for key in range(count):
        promoted, bracket, rung = halving.next(by_key)
        halving.begin(key, bracket, rung, promoted)
        halving.finish(key)
        out.append((bracket, promoted, rung))
    return out


def test_one_in_eta_is_promoted_and_the_best_first() -> None:
    played = play(Hyperband((1, 3, 9), 3, brackets=1), 40)
    counts = [sum(rung == each for _, _, rung in played) for each in range(3)]
    assert counts[0] >= 3 * counts[1] >= 9 * counts[2] > 0
    first = next(promoted for _, promoted, _ in played if promoted is not None)
    assert first == 0
    assert len({promoted for _, promoted, _ in played if promoted is not None}) == counts[1] + counts[2]


def test_brackets_spend_alike() -> None:
    sizes = (100, 300, 900)
    spent = [0, 0, 0]
    for bracket, _, rung in play(Hyperband(sizes, 3), 200):
        spent[bracket] += sizes[rung]
    assert max(spent) - min(spent) <= 2 * 900 + 300


def test_nothing_is_promoted_that_nobody_ranks() -> None:
    halving = Hyperband((1, 3), 3, brackets=1)
    for key in range(12):
        promoted, bracket, rung = halving.next(lambda keys: [])
        assert (promoted, rung) == (None, 0)
        halving.begin(key, bracket, rung, promoted)
        halving.finish(key)
    assert halving.next(by_key)[0] is not None
