"""MAP-Elites' cells and parents; what every algorithm must do is in the conformance suite."""

from __future__ import annotations

from typing import Any

import numpy as np

from optimizer.algorithms import Outcome
from optimizer.algorithms.map_elites import MapElites
from tests.optimizer.algorithms.driving import make_context, reals


def told(rows: list[list[list[float]]], **options: Any) -> MapElites:
    """``rows``: for each candidate the scores of each objective's items."""
    algorithm = MapElites(make_context(reals(2), objectives=len(rows[0])), MapElites.Options(**options))
    for index, row in enumerate(rows):
        gains = tuple(np.array(part, dtype=np.float32) for part in row)
        losses = np.array([-part.mean() for part in gains])
        algorithm.tell(Outcome(index, np.array([0.1 * index, 0.0]), losses, own=False, gains=gains))
    return algorithm


def parents(algorithm: MapElites) -> list[tuple[int, ...]]:
    return [proposal.parents for proposal in algorithm.ask(300)]


def members(algorithm: MapElites) -> set[int]:
    return {parent for pair in parents(algorithm) for parent in pair}


def test_groups_of_items_take_turns() -> None:
    """Candidates 0 and 1 are right on the even items, 2 on the odd ones: two cells."""
    rows = [[[1.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 0.0]], [[0.0, 1.0, 0.0, 0.0]]]
    assert members(told(rows)) == {0, 2}


def test_groups_as_given() -> None:
    rows = [[[1.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 0.0]], [[0.0, 1.0, 0.0, 0.0]]]
    assert members(told(rows, item_groups=[0, 0, 1, 1])) == {0, 1}
    assert members(told(rows, item_groups=[0, 0, 1])) == {0, 2}, "not one for each item"


def test_objectives_are_descriptors_where_there_are_several() -> None:
    rows = [[[1.0], [0.0]], [[0.0], [1.0]], [[0.5], [0.5]], [[0.52], [0.54]]]
    assert members(told(rows)) == {0, 1, 3}
    assert members(told(rows, bins=1)) == {3}, "one cell, whose elite has random mates"


def test_parents_are_drawn_in_proportion_to_quality() -> None:
    pairs = parents(told([[[0.9], [0.0]], [[0.0], [0.3]], [[0.0], [0.0]]]))
    firsts = [pair[0] for pair in pairs if pair]
    assert 2 < firsts.count(0) / firsts.count(1) < 4.5 and 2 not in firsts
    assert all(len({*pair}) == len(pair) for pair in pairs)


def test_losses_have_no_bounds() -> None:
    rows = [[[-5.0], [-1.0]], [[-1.0], [-5.0]], [[-3.0], [-3.0]], [[-9.0], [-9.0]]]
    assert {0, 1, 2} <= members(told(rows))
