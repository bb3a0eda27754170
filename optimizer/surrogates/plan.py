"""The points at which MAP begins: experts alone, diagonals, and mixtures with some jitter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from optimizer.algorithms.base import AlgorithmContext
from optimizer.space import JobSpace, SearchSpace
from optimizer.surrogates.archive import Observed
from optimizer.surrogates.designs import mixtures
from optimizer.surrogates.encoding import Encoding, Units

_DIAGONALS = (0.5, 1.0, 0.25, 0.75)


def columns_of(context: AlgorithmContext, encoding: Encoding) -> list[NDArray[np.int64]]:
    """Return the variables of each coefficient: all groups of an expert where the space is a table, else one by one."""
    space = context.space
    rows, columns = space.axes if isinstance(space, JobSpace) else ((), ())
    size = len(rows) * len(columns)
    if not size or size > space.dim:
        return [np.array([number]) for number in np.flatnonzero(encoding.real)]
    return [np.arange(number, size, len(columns)) for number in range(len(columns))]


def sampling_plan(
    context: AlgorithmContext, encoding: Encoding, known: Observed, count: int, random: np.random.Generator
) -> Units:
    """Return the points that are missing to ``count`` outcomes, shape (n, dim), two at least, none that was told before."""
    told = known.where(known.measured)
    wanted = max(2, count - len(told))
    fixed = encoding.repair(np.vstack([encoding.units(context.start), *corners(context, encoding, wanted)]))
    seen = {row.tobytes() for row in encoding.repair(np.vstack([told.units, np.zeros((1, encoding.dim))])[:-1])}
    new = [row for row in fixed if row.tobytes() not in seen and not seen.add(row.tobytes())]  # type: ignore[func-returns-value]
    new = new[: max(1, wanted // 2)] if len(told) else new[:wanted]
    anchors = np.clip(np.vstack([fixed, told.units]), 0.0, 1.0)
    mixed = encoding.repair(mixtures(random, wanted - len(new), anchors))
    for variable in np.flatnonzero(~encoding.real):
        mixed[:, variable] = random.random(len(mixed))
    return np.vstack([*new, encoding.repair(mixed)])


def holds_zero_and_one(space: SearchSpace, variables: NDArray[np.int64] | slice = slice(None)) -> bool:
    """Whether 0 and 1 lie within the bounds of these variables."""
    return bool((space.low[variables] <= 0).all() and (space.high[variables] >= 1).all())


def corners(context: AlgorithmContext, encoding: Encoding, most: int) -> list[Units]:
    """Return each coefficient 1 alone, and all alike, each (1, dim); none where they are too many or never 0 or 1."""
    columns = columns_of(context, encoding)
    if not columns or len(columns) > most:
        return []
    every = np.concatenate(columns)
    if not holds_zero_and_one(context.space, every):
        return []
    out = []
    for column in columns if len(columns) > 1 else []:
        genome = context.start.copy()
        genome[every] = 0.0
        genome[column] = 1.0
        out.append(encoding.units(genome)[None])
    for value in _DIAGONALS:
        genome = context.start.copy()
        genome[every] = value
        out.append(encoding.units(genome)[None])
    return out
