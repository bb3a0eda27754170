"""Evenly spread points on the unit simplex: reference points of NSGA-III, weights of MOEA/D."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
from numpy.typing import NDArray

from optimizer.errors import InvalidInput

Points = NDArray[np.float64]

_INNER = 0.5


def das_dennis(objectives: int, partitions: int) -> Points:
    """Return all points of the unit simplex whose coordinates are multiples of 1 / ``partitions``.

    Das and Dennis 1998. Shape (C(objectives + partitions - 1, partitions), objectives); the centre alone for 0
    partitions.
    """
    if partitions == 0 or objectives == 1:
        return np.full((1, objectives), 1 / objectives)
    bars = itertools.combinations(range(objectives + partitions - 1), objectives - 1)
    places = np.array(list(bars), dtype=np.float64).reshape(-1, objectives - 1)
    edges = np.pad(places, ((0, 0), (1, 1)), constant_values=-1.0)
    edges[:, -1] = objectives + partitions - 1
    return np.asarray((np.diff(edges, axis=1) - 1) / partitions, dtype=np.float64)


def spread_points(objectives: int, at_most: int) -> Points:
    """Return as many evenly spread points of the unit simplex as ``at_most`` allows, at least one per objective.

    Das and Dennis's points with the most partitions that fit. With fewer partitions than objectives these all lie on the
    border of the simplex, so a second, inner layer of half its size joins them where it fits (Deb and Jain 2014).

    Returns:
        Shape (points, objectives); the number of points can be well below ``at_most`` with three objectives or more.
    """
    outer = _partitions(objectives, at_most, largest=at_most)
    points = das_dennis(objectives, max(outer, 1))
    left = at_most - len(points)
    if outer >= objectives or left < 1:
        return points
    inner = das_dennis(objectives, _partitions(objectives, left, largest=outer))
    return np.vstack([points, (1 - _INNER) / objectives + _INNER * inner])


def given_points(rows: list[list[float]], objectives: int, field: str) -> Points:
    """Return points that a user gave, scaled to the unit simplex, shape (rows, objectives).

    Raises:
        InvalidInput: a row has another length than there are objectives, or a negative number, or nothing but zeros.
    """
    for number, row in enumerate(rows):
        if len(row) != objectives or min(row) < 0 or sum(row) <= 0:
            raise InvalidInput(
                f"{row} is no direction in {objectives} objectives",
                field=f"{field}.{number}",
                remedy="give a number for each objective, none of them negative and one at least above 0",
            )
    points = np.array(rows, dtype=np.float64)
    return np.asarray(points / points.sum(axis=1, keepdims=True), dtype=np.float64)


def _partitions(objectives: int, at_most: int, largest: int) -> int:
    """The most partitions, up to ``largest``, that give no more than ``at_most`` points."""
    partitions = 0
    while partitions < largest and comb(objectives + partitions, partitions + 1) <= at_most:
        partitions += 1
    return partitions
