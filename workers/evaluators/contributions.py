"""Measures of all items together, such as correlations, as contributions of single items whose mean they are.

A job's value of an objective is the mean of its items' scores. A correlation is no mean of anything that an item has by
itself; but it is one of what each item contributes to it, given all the others. Such contributions say which items pull
a measure up or down. They change with the set of items, so they are measured on all of them or not at all: the metrics
they belong to are in `workers.evaluators.base.Evaluator.whole_only`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Vector = NDArray[np.float64]


def pearson(predicted: Vector, observed: Vector) -> Vector:
    """Return products of standardised values, shape (items,): their mean is Pearson's correlation.

    NaN throughout where either side is constant or has a value that is not finite: there is no correlation then.
    """
    return _standardised(predicted) * _standardised(observed)


def spearman(predicted: Vector, observed: Vector) -> Vector:
    """Return products of standardised ranks (ties share their mean rank): their mean is Spearman's correlation."""
    return pearson(_ranks(predicted), _ranks(observed))


def determination(predicted: Vector, observed: Vector) -> Vector:
    """Return 1 − squared error / variance of what was observed, shape (items,): the mean is R².

    NaN throughout where what was observed is constant.
    """
    variance = np.nan if np.ptp(observed) == 0 else observed.var()
    out: Vector = 1 - np.square(predicted - observed) / variance
    return out


def macro_f1(predicted: NDArray[np.int64], observed: NDArray[np.int64], classes: int) -> Vector:
    """Return contributions to the mean F1 of the classes that are predicted or observed, shape (items,).

    The F1 of a class c is 2 TP / (predicted + observed), so each right answer adds 2 N / (K (predicted + observed)), with N
    items and K classes; wrong ones add 0.

    Args:
        predicted: shape (items,): classes from 0.
        observed: shape (items,): the right ones.
        classes: how many there are.
    """
    sizes = np.bincount(predicted, minlength=classes) + np.bincount(observed, minlength=classes)
    share = 2 * len(observed) / (np.count_nonzero(sizes) * np.maximum(sizes, 1))
    return np.where(predicted == observed, share[observed], 0.0)


def mean_overlap(shared: Vector, united: Vector) -> Vector:
    """Return contributions to the mean over the classes of what all items share, by what they unite, shape (items,).

    That is the mean intersection over union of a data set, of the classes that occur.

    Args:
        shared: shape (classes, items): pixels of a class in both.
        united: shape (classes, items): pixels of a class in either.
    """
    totals = united.sum(axis=1, keepdims=True)
    occurs = ~(totals[:, 0] == 0)  # true of NaN too, which must not go unnoticed
    if not occurs.any():
        return np.ones(shared.shape[1])
    out: Vector = (shared[occurs] / totals[occurs]).mean(axis=0) * shared.shape[1]
    return out


def balanced_weights(observed: NDArray[np.int64]) -> Vector:
    """Return weights, shape (items,), with which every class that occurs counts the same in a mean; their mean is 1."""
    _, where, counts = np.unique(observed, return_inverse=True, return_counts=True)
    out: Vector = len(observed) / (len(counts) * counts[where].astype(np.float64))
    return out


def _standardised(values: Vector) -> Vector:
    if not np.isfinite(values).all() or np.ptp(values) == 0:
        return np.full(values.shape, np.nan)
    centred = values / np.abs(values).max()  # so that squares neither overflow nor vanish
    centred = centred - centred.mean()
    out: Vector = centred / np.sqrt(np.square(centred).mean())
    return out


def _ranks(values: Vector) -> Vector:
    ranks: Vector = rankdata(values) if np.isfinite(values).all() else np.full(values.shape, np.nan)
    return ranks
