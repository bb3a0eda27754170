"""A forest of random regression trees with a variance of its predictions, as SMAC uses (Hutter, Hoos, Leyton-Brown 2011)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.surrogates.encoding import Features

Vector = NDArray[np.float64]

_SHARE = 5 / 6


class Forest:
    """Trees of scikit-learn, grown one by one: its forests spend most of a small fit's time on scheduling.

    Each tree sees a bootstrap sample, splits at random places (Geurts et al. 2006) until its leaves are pure, and chooses
    from five sixths of the features. On merges of 5 to 60 coefficients that gave better searches than the best splits, or
    leaves of three. The variance is that of the trees' means.

    Args:
        x: shape (n, features).
        y: shape (n,).
        trees: number of trees.
        random: for bootstrap samples and splits.
    """

    def __init__(
        self,
        x: Features,
        y: Vector,
        random: np.random.Generator,
        *,
        trees: int = 20,
    ) -> None:
        # Only a search that grows trees waits for this import: an API process stays small.
        from sklearn.tree import ExtraTreeRegressor

        self._trees: list[Any] = []
        narrow = np.ascontiguousarray(x, dtype=np.float32)
        for _ in range(trees):
            seed = int(random.integers(2**31))
            counts = np.bincount(random.integers(len(x), size=len(x)), minlength=len(x)).astype(np.float64)
            grown = ExtraTreeRegressor(max_features=_SHARE, random_state=seed)
            grown.fit(narrow, y, sample_weight=counts, check_input=False)
            self._trees.append(grown.tree_)

    def predict(self, x: Features) -> tuple[Vector, Vector]:
        """Return mean and standard deviation, each of shape (m,), at ``x``, shape (m, features)."""
        narrow = np.ascontiguousarray(x, dtype=np.float32)
        means = np.array([tree.value[tree.apply(narrow), 0, 0] for tree in self._trees])
        return means.mean(axis=0), np.sqrt(np.maximum(means.var(axis=0), 1e-12))
