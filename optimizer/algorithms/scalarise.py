"""One number for several losses, for searches that follow only one: weighted sum or Tchebycheff, normalised or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from optimizer.algorithms.base import Outcome, ranked_losses

Scalarisation = Literal["weighted_sum", "tchebycheff"]

_AUGMENTATION = 0.05
ENOUGH = 3
"""Outcomes, before spreads are taken from them."""


def spread_of(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the interquartile range of each objective, shape (objectives,); the whole range, or else 1, where that is 0."""
    upper, lower = np.percentile(losses, [75, 25], axis=0)
    spread = np.where(upper > lower, upper - lower, np.ptp(losses, axis=0))
    return np.asarray(np.where(spread > 0, spread, 1.0), dtype=np.float64)


class Scalariser:
    """Ranks outcomes by one number each, to be minimised.

    With g_k = (loss_k - ideal_k) / spread_k, the number is Σ w_k·g_k for ``weighted_sum`` and
    max_k w_k·g_k + 0.05·Σ w_k·g_k for ``tchebycheff``: the augmented Tchebycheff function (Steuer and Choo 1983; ParEGO's
    augmentation, Knowles 2006), whose minima are Pareto optimal and can lie on concave parts of the front too.

    Ideal (minimum) and spread (interquartile range, which one ruined candidate cannot blow up) are those of the outcomes
    seen before the first ranking, if there are three: warm starts, or the first generation. Then they are frozen, so that
    numbers of different generations can be compared.

    Args:
        weights: shape (objectives,), positive.
        method: how losses are combined.
        normalise: False leaves the losses on their own scales (spread 1).
    """

    def __init__(self, weights: NDArray[np.float64], method: Scalarisation, normalise: bool) -> None:
        self._weights = weights
        self._method = method
        self._normalise = normalise
        self._seen: list[NDArray[np.float64]] = []
        self._frozen = False
        self._ideal = np.zeros(len(weights))
        self._spread = np.ones(len(weights))

    def observe(self, outcome: Outcome) -> None:
        """Take an outcome into account for ideal and spread, unless these are frozen."""
        if not self._frozen and outcome.losses is not None and np.isfinite(outcome.losses).all():
            self._seen.append(outcome.losses)

    def rank(self, outcomes: Sequence[Outcome]) -> NDArray[np.float64]:
        """Return a finite number for each outcome, shape (outcomes,); those without feasible losses come last."""
        self._measure()
        combined = [
            outcome if outcome.losses is None else replace(outcome, losses=self._combine(outcome.losses))
            for outcome in outcomes
        ]
        return ranked_losses(combined, np.ones(1))

    @property
    def linear(self) -> NDArray[np.float64] | None:
        """The weights of the losses in a sum that ranks as this does, shape (objectives,); None if none does."""
        return self._weights / self._spread if self._frozen and self._method == "weighted_sum" else None

    def _measure(self) -> None:
        if self._frozen or not self._seen:
            return
        seen = np.array(self._seen)
        self._ideal = seen.min(axis=0)
        if self._normalise:
            self._spread = spread_of(seen)
        self._frozen = len(seen) >= ENOUGH

    def _combine(self, losses: NDArray[np.float64]) -> NDArray[np.float64]:
        terms = self._weights * (losses - self._ideal) / self._spread
        total = terms.sum()
        if self._method == "tchebycheff":
            total = terms.max() + _AUGMENTATION * total
        return np.array([total])
