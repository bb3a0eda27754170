"""Scores of some of an objective's items: what a cache knows, what is still to be measured, and both put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optimizer.fitness.aggregate import ItemScores

Places = NDArray[np.int64]


@dataclass(frozen=True)
class PlacedScores:
    """Scores of some items.

    Attributes:
        places: shape (scored,): which of the objective's items, each once.
        scores: of these, in the same order.
    """

    places: Places
    scores: ItemScores

    @classmethod
    def none(cls) -> PlacedScores:
        """Return the scores of no item."""
        return cls(np.empty(0, np.int64), ItemScores(np.empty(0, np.float32)))


Known = Mapping[str, PlacedScores]
"""By objective."""


def union(parts: Sequence[PlacedScores]) -> PlacedScores:
    """Return all scores of several parts; where parts overlap, the first counts. Parts without any item change nothing."""
    parts = [part for part in parts if len(part.places)]
    if not parts:
        return PlacedScores.none()
    places = np.concatenate([part.places for part in parts])
    values = np.concatenate([part.scores.values for part in parts])
    weights = None
    if all(part.scores.weights is not None for part in parts):
        weights = np.concatenate([part.scores.weights for part in parts if part.scores.weights is not None])
    kept = np.sort(np.unique(places, return_index=True)[1])
    return PlacedScores(places[kept], ItemScores(values[kept], None if weights is None else weights[kept]))


def missing(known: PlacedScores, wanted: Places) -> Places:
    """Return those of ``wanted`` that are not known, in the order of ``wanted``."""
    return wanted[~np.isin(wanted, known.places)]


def pick(known: PlacedScores, wanted: Places) -> ItemScores | None:
    """Return the scores of ``wanted``, in its order; None if one is not known."""
    order = np.argsort(known.places, kind="stable")
    at = np.searchsorted(known.places, wanted, sorter=order)
    if len(wanted) and (not len(order) or (at >= len(order)).any()):
        return None
    found = order[at] if len(wanted) else np.empty(0, np.int64)
    if not np.array_equal(known.places[found], wanted):
        return None
    weights = known.scores.weights
    return ItemScores(known.scores.values[found], None if weights is None else weights[found])
