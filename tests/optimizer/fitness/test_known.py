"""Scores of some items: joined, looked up, and asked what is missing."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.known import PlacedScores, missing, pick, union


def part(places: list[int], weighted: bool) -> PlacedScores:
    at = np.array(places, dtype=np.int64)
    return PlacedScores(at, ItemScores(at.astype(np.float32) * 2, at.astype(np.float32) + 1 if weighted else None))


subsets = st.lists(st.integers(0, 20), unique=True, max_size=12)


@given(st.lists(subsets, max_size=4), subsets, st.booleans())
def test_what_is_known_and_what_is_missing(parts: list[list[int]], wanted: list[int], weighted: bool) -> None:
    known = union([part(each, weighted) for each in parts])
    everything = {place for each in parts for place in each}
    assert sorted(known.places.tolist()) == sorted(everything)
    order = np.array(wanted, dtype=np.int64)
    lacking = missing(known, order)
    assert lacking.tolist() == [place for place in wanted if place not in everything]
    found = pick(known, order)
    assert (found is None) == bool(len(lacking))
    if found is not None:
        assert found.values.tolist() == [2 * place for place in wanted]
        if weighted and wanted:
            assert found.weights is not None
            assert found.weights.tolist() == [place + 1 for place in wanted]
    whole = pick(union([known, part(lacking.tolist(), weighted)]), order)
    assert whole is not None
    assert whole.values.tolist() == [2 * place for place in wanted]


def test_the_first_part_counts() -> None:
    first = PlacedScores(np.array([1, 2]), ItemScores(np.array([5, 6], np.float32)))
    found = pick(union([first, part([2, 3], weighted=False)]), np.array([1, 2, 3]))
    assert found is not None
    assert found.values.tolist() == [5, 6, 6]
