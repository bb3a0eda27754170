"""A grid of niches: in each cell the best candidate with such descriptors (MAP-Elites, arXiv 1504.04909)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optimizer.space import Genome

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Elite:
    """The best candidate of a cell.

    Attributes:
        index: the candidate's number in the job.
        genome: its genome.
        quality: more is better.
        descriptors: shape (dimensions,): what the grid is over.
    """

    index: int
    genome: Genome
    quality: float
    descriptors: Vector


class Grid:
    """Cells of equal size over each descriptor's range.

    The range is 0 to 1 while all values told so far lie in it (accuracies do), else from the lowest to the highest of
    them. When it grows, the elites move to their new cells, where they may meet.

    Args:
        bins: cells along each dimension.
        dimensions: number of descriptors; with none there is a single cell.
    """

    def __init__(self, bins: int, dimensions: int) -> None:
        self._bins = bins
        self._seen = np.full(dimensions, np.inf), np.full(dimensions, -np.inf)
        self._range = np.zeros(dimensions), np.ones(dimensions)
        self._cells: dict[tuple[int, ...], Elite] = {}

    def __len__(self) -> int:
        return len(self._cells)

    def __iter__(self) -> Iterator[Elite]:
        return iter(self._cells.values())

    def add(self, new: Elite) -> bool:
        """Put a candidate in its cell if that is empty or its elite is worse; return whether it was."""
        self._seen = np.minimum(self._seen[0], new.descriptors), np.maximum(self._seen[1], new.descriptors)
        low, high = self._seen
        inside = (low >= 0) & (high <= 1)
        wanted = np.where(inside, 0.0, low), np.where(inside, 1.0, high)
        if not (np.array_equal(wanted[0], self._range[0]) and np.array_equal(wanted[1], self._range[1])):
            self._range = wanted
            known, self._cells = list(self), {}
            for elite in known:
                self._put(elite)
        return self._put(new)

    def cell(self, descriptors: Vector) -> tuple[int, ...]:
        """Return the cell of these descriptors, a number from 0 to bins − 1 in each dimension."""
        low, high = self._range
        width = np.where(high > low, high - low, 1.0)
        places = np.floor((descriptors - low) / width * self._bins)
        return tuple(np.clip(places, 0, self._bins - 1).astype(int).tolist())

    def _put(self, new: Elite) -> bool:
        cell = self.cell(new.descriptors)
        old = self._cells.get(cell)
        if old is not None and new.quality <= old.quality:
            return False
        self._cells[cell] = new
        return True
