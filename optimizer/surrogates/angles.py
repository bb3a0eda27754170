"""Where among the directions of few coefficients the next sample teaches most (MAP's Bayesian variant).

Directions are cut into bins by their hyperspherical angles. A bin's score is how badly the surrogate predicted its samples,
the mean plus half a standard deviation; one without samples scores as the worst. A bin is drawn by a softmax of the scores
with temperature 0.07.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

LARGEST = 5
"""Most variables: the bins multiply."""

_BINS = 4
_TEMPERATURE = 0.07


def draw(points: Matrix, errors: Vector, random: np.random.Generator) -> Vector:
    """Return the next point, shape (n,), in the unit cube: of a drawn bin, at a random distance from the origin.

    Args:
        points: shape (m, n), n at least 2, the samples so far; what is negative counts as 0.
        errors: shape (m,), not negative, of their predictions.
    """
    bins = np.floor(np.minimum(angles(points) / (np.pi / 2), 1 - 1e-9) * _BINS).astype(int)
    width = points.shape[1] - 1
    places = bins @ _BINS ** np.arange(width)
    scores = np.full(_BINS**width, np.nan)
    for place in np.unique(places):
        mine = errors[places == place]
        scores[place] = mine.mean() + 0.5 * mine.std()
    worst = max(float(np.nanmax(scores)), 1e-12)
    logits = np.where(np.isnan(scores), 1.0, scores / worst) / _TEMPERATURE
    shares = np.exp(logits - logits.max())
    place = int(random.choice(len(shares), p=shares / shares.sum()))
    chosen = (place // _BINS ** np.arange(width)) % _BINS
    direction = of_angles((chosen + random.random(width)) / _BINS * np.pi / 2)
    return np.asarray(direction / direction.max() * random.random() ** (1 / (width + 1)), dtype=np.float64)


def angles(points: Matrix) -> Matrix:
    """Return the hyperspherical angles, shape (m, n - 1), each between 0 and π/2."""
    inside = np.maximum(points, 0.0)
    tails = np.sqrt(np.cumsum((inside**2)[:, ::-1], axis=1)[:, ::-1])
    return np.asarray(np.arctan2(tails[:, 1:], inside[:, :-1]), dtype=np.float64)


def of_angles(values: Vector) -> Vector:
    """Return the unit vector, shape (n,), of angles, shape (n - 1,)."""
    sines = np.concatenate([[1.0], np.cumprod(np.sin(values))])
    return np.asarray(sines * np.append(np.cos(values), 1.0), dtype=np.float64)
