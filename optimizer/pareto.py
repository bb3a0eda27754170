"""Dominance, fronts, crowding and hypervolume, all in losses: every column is to be minimised."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]


def dominates(a: Losses, b: Losses) -> bool:
    """Whether ``a`` is nowhere worse than ``b`` and somewhere better."""
    return bool((a <= b).all() and (a < b).any())


def front_mask(losses: Losses) -> NDArray[np.bool_]:
    """Return which rows of ``losses``, shape (n, m), no other row dominates; equal rows are all kept.

    Rows with NaN are never on the front. Costs O(n · front) after one sort: 100,000 rows take well under a second
    unless most of them are on the front.
    """
    mask = np.zeros(len(losses), dtype=bool)
    valid = np.flatnonzero(~np.isnan(losses).any(axis=1))
    order = valid[np.lexsort(losses[valid].T[::-1])]
    kept = np.empty((0, losses.shape[1]))
    for i in order:
        row = losses[i]
        weakly = (kept <= row).all(axis=1)
        if weakly.any() and (kept[weakly] < row).any(axis=1).any():
            continue
        mask[i] = True
        kept = np.vstack([kept, row])
    return mask


def update_front(front: Losses, new: Losses) -> tuple[bool, NDArray[np.bool_]]:
    """Say what one new point does to a front.

    Args:
        front: shape (k, m), the present front.
        new: shape (m,).

    Returns:
        Whether ``new`` joins it, and which rows of ``front`` it pushes out, shape (k,).
    """
    if not np.isfinite(new).all():
        return False, np.zeros(len(front), dtype=bool)
    if not len(front):
        return True, np.zeros(0, dtype=bool)
    better = (front <= new).all(axis=1) & (front < new).any(axis=1)
    if better.any():
        return False, np.zeros(len(front), dtype=bool)
    return True, np.asarray((new <= front).all(axis=1) & (new < front).any(axis=1), dtype=np.bool_)


def nondominated_ranks(losses: Losses) -> NDArray[np.int64]:
    """Return the number of the front each row belongs to, from 0, shape (n,) (NSGA-II, Deb et al. 2002)."""
    n = len(losses)
    le = np.asarray((losses[:, None, :] <= losses[None, :, :]).all(axis=2), dtype=np.bool_)
    lt = np.asarray((losses[:, None, :] < losses[None, :, :]).any(axis=2), dtype=np.bool_)
    beats = le & lt
    counts = beats.sum(axis=0)
    ranks = np.full(n, -1, dtype=np.int64)
    rank = 0
    while (ranks < 0).any():
        current = np.flatnonzero((counts == 0) & (ranks < 0))
        ranks[current] = rank
        counts = counts - beats[current].sum(axis=0)
        rank += 1
    return ranks


def crowding_distance(losses: Losses) -> NDArray[np.float64]:
    """Return the crowding distance of each row within its front, shape (n,); the ends of each objective are infinite."""
    n, m = losses.shape
    distance = np.zeros(n)
    if not n:
        return distance
    for column in range(m):
        order = np.argsort(losses[:, column], kind="stable")
        values = losses[order, column]
        distance[order[[0, -1]]] = np.inf
        span = values[-1] - values[0]
        if n > 2 and span > 0:
            distance[order[1:-1]] += (values[2:] - values[:-2]) / span
    return distance


def hypervolume(losses: Losses, reference: Losses) -> float:
    """Return the volume that the rows of ``losses``, shape (n, m), dominate below ``reference``, shape (m,).

    Exact, by slicing along the last objective (While et al. 2006); meant for fronts of up to a few hundred points in up
    to four objectives.
    """
    inside = losses[(losses < reference).all(axis=1)]
    if not len(inside):
        return 0.0
    inside = inside[front_mask(inside)]
    return _slice(np.unique(inside, axis=0), reference)


def _slice(points: Losses, reference: Losses) -> float:
    if points.shape[1] == 1:
        return float(reference[0] - points[:, 0].min())
    if points.shape[1] == 2:
        order = points[np.lexsort((points[:, 1], points[:, 0]))]
        ceilings = np.concatenate([[reference[1]], np.minimum.accumulate(order[:, 1])[:-1]])
        heights = np.maximum(0.0, np.minimum(ceilings, reference[1]) - order[:, 1])
        return float(((reference[0] - order[:, 0]) * heights).sum())
    ordered = points[np.argsort(points[:, -1], kind="stable")]
    edges = np.append(ordered[:, -1], reference[-1])
    volume = 0.0
    for count in range(1, len(ordered) + 1):
        depth = edges[count] - edges[count - 1]
        if depth > 0:
            volume += depth * _slice(ordered[:count, :-1], reference[:-1])
    return volume
