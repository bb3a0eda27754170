"""Genomes as points of the unit cube, and as features in which distance means something on mixed spaces."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from optimizer.space import Genome, SearchSpace

Units = NDArray[np.float64]
Features = NDArray[np.float64]

_GRID = 2.0**30
"""Steps of the unit interval that are told apart: what a genome's last bits say must not change a search."""


class Encoding:
    """Maps genomes to the unit cube (units) and to features, and back.

    A real variable is one feature, its unit. An integer is the unit of its rounded value, so that a model is constant
    where the recipe is (Garrido-Merchán and Hernández-Lobato 2020, arXiv:1805.03463). A choice is one-hot; two choices lie
    at distance 1.

    Args:
        space: what is searched.

    Attributes:
        dim: number of variables.
        real: shape (dim,), which variables are real.
        owner: shape (features,), the variable that each feature belongs to.
        start: shape (dim,), each variable's first feature.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.dim = space.dim
        self._space = space
        self._range = np.where(space.high > space.low, space.high - space.low, 1.0)
        kinds = [variable.kind for variable in space.variables]
        self.real = np.array([kind == "real" for kind in kinds])
        self._integer = np.array([kind == "integer" for kind in kinds])
        self._choice = np.array([kind == "choice" for kind in kinds])
        widths = np.where(self._choice, np.round(space.high - space.low), 1).astype(int)
        self.owner = np.repeat(np.arange(self.dim), widths)
        self.start = np.cumsum(widths) - widths
        self._widths = widths

    @property
    def discrete(self) -> bool:
        """Whether any variable is not real."""
        return not bool(self.real.all())

    def units(self, genomes: NDArray[np.float64]) -> Units:
        """Return genomes, shape (..., dim), in units; those outside the bounds lie outside the unit cube."""
        return np.asarray(np.round((genomes - self._space.low) / self._range * _GRID) / _GRID, dtype=np.float64)

    def repair(self, units: Units) -> Units:
        """Return units, shape (n, dim), in the cube and on its grid, integers whole and choices in mid-cell."""
        out = np.clip(units, 0.0, 1.0)
        steps = self._range[self._integer]
        out[:, self._integer] = np.round(out[:, self._integer] * steps) / steps
        cells = self._range[self._choice]
        out[:, self._choice] = (np.minimum(np.floor(out[:, self._choice] * cells), cells - 1) + 0.5) / cells
        return np.asarray(np.round(out * _GRID) / _GRID, dtype=np.float64)

    def genome(self, unit: Units) -> Genome:
        """Return the genome of one unit vector, shape (dim,), inside the bounds."""
        return self._space.clip(self._space.low + unit * self._range)

    def features(self, units: Units) -> Features:
        """Return the features, shape (n, features), of units, shape (n, dim)."""
        if not self.discrete:
            return units
        out = np.zeros((len(units), len(self.owner)))
        out[:, self.start[self.real]] = units[:, self.real]
        steps = self._range[self._integer]
        out[:, self.start[self._integer]] = np.round(units[:, self._integer] * steps) / steps
        for variable in np.flatnonzero(self._choice):
            width = self._widths[variable]
            cell = np.clip(np.floor(units[:, variable] * width), 0, width - 1).astype(int)
            out[np.arange(len(units)), self.start[variable] + cell] = np.sqrt(0.5)
        return out
