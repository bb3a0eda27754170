"""First points of a search, before there is anything to fit a model to."""

from __future__ import annotations

import numpy as np

from optimizer.surrogates.encoding import Units

_JITTER = 0.1


def latin_hypercube(random: np.random.Generator, count: int, dim: int) -> Units:
    """Return points, shape (count, dim), of which each variable has one in each of ``count`` intervals."""
    cells = random.permuted(np.tile(np.arange(count), (dim, 1)), axis=1).T
    return np.asarray((cells + random.random((count, dim))) / max(count, 1), dtype=np.float64)


def mixtures(random: np.random.Generator, count: int, anchors: Units) -> Units:
    """Return mixtures, shape (count, dim), of known points with some jitter.

    Far from the experts' hull most merges are useless, so points around it are worth more than an even cover.
    """
    weights = random.dirichlet(np.ones(len(anchors)), count)
    return np.asarray(weights @ anchors + _JITTER * random.standard_normal((count, anchors.shape[1])), dtype=np.float64)


def first_points(random: np.random.Generator, count: int, start: Units, known: Units) -> Units:
    """Return the start (unless known), mixtures of what is known, and a Latin hypercube, a half each.

    Args:
        start: shape (dim,).
        known: shape (n, dim), what was evaluated before.
    """
    inside = np.clip(known, 0.0, 1.0)
    begin = [] if (known == start).all(axis=1).any() else [start]
    mixed = (count - len(begin) + 1) // 2
    anchors = np.vstack([start, inside])
    rest = max(0, count - len(begin) - mixed)
    parts = [*begin, mixtures(random, mixed, anchors), latin_hypercube(random, rest, len(start))]
    return np.vstack(parts)[:count]
