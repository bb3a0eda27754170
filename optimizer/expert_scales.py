"""How far each expert's coefficients may be moved: what no bounds say, and a few evaluations do.

A checkpoint that does not belong in the pool ruins a merge in doses at which the others hardly count. A search that moves
all coefficients by as much never sees a good candidate then.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from optimizer.space import Genome, MergeSpace, SearchSpace

Vector = NDArray[np.float64]

STEP = 0.07
"""Of a range; at digits experts with strangers, whose losses turn at once: about 0.1 in a coefficient."""
SMALLEST = 0.05
"""Of the usual scale."""
SHARE = 1 / 3
"""Of the budget that probes may take."""


def expert_columns(space: SearchSpace) -> NDArray[np.int64] | None:
    """Return the expert that each variable is a coefficient of, shape (dim,), -1 for other variables.

    None where the space has no coefficients of several experts.
    """
    if not isinstance(space, MergeSpace):
        return None
    rows, cols = space.table
    if cols < 2:
        return None
    columns: NDArray[np.int64] = np.concatenate([np.tile(np.arange(cols), rows), np.full(space.dim - rows * cols, -1)])
    return columns


class Probes:
    """A point, and a step of each expert from there, in all layers at once.

    Args:
        space: that has experts.
        columns: see `expert_columns`.
        start: the point, shape (dim,).

    Attributes:
        genomes: the point, then one for each expert: its coefficients are moved up, or down where the bounds leave no room.
    """

    def __init__(self, space: SearchSpace, columns: NDArray[np.int64], start: Genome) -> None:
        self._columns = columns
        self.genomes = [start]
        step = STEP * (space.high - space.low)
        for expert in range(int(columns.max()) + 1):
            mine = columns == expert
            up = bool((start + step <= space.high)[mine].all())
            self.genomes.append(space.clip(np.where(mine, start + (step if up else -step), start)))

    def scales(self, genomes: Sequence[Genome], losses: Sequence[float]) -> Vector:
        """Return how far each variable may be moved, shape (dim,): 1 as usual, less where the loss changes more.

        An expert that changes the loss by more than the median of the experts is moved less in proportion; one whose
        probe failed, least of all.

        Args:
            genomes: those that were evaluated, each a probe as recorded.
            losses: one number for each.
        """
        found = dict(zip((self._nearest(genome) for genome in genomes), losses, strict=True))
        if 0 not in found:
            return np.ones(len(self._columns))
        changes = np.array([abs(found.get(place, np.inf) - found[0]) for place in range(1, len(self.genomes))])
        usual = float(np.median(changes))
        scales = np.divide(usual, changes, out=np.ones_like(changes), where=changes > usual)
        scales[~np.isfinite(changes)] = SMALLEST
        return np.where(self._columns >= 0, np.clip(scales, SMALLEST, 1.0)[self._columns], 1.0)

    def _nearest(self, genome: Genome) -> int:
        return int(np.argmin([np.abs(probe - genome).max() for probe in self.genomes]))
