"""From a merge's scores on a few anchor items to its value on all of them, with a standard error.

What all estimators here share: some models (the references: experts, the base, earlier candidates) were measured on all N
items, a merge on n of them, the anchors.

- ``mean``: the mean over the anchors, drawn at random. Its variance is s²/n · (1 − n/N) (sampling without replacement).
- ``weighted``: anchors stand for clusters of items on which the references score alike, each weighted by the size of its
  cluster (tinyBenchmarks, arXiv:2402.14992). How much clusters help a merge nobody knows beforehand (those that they were
  made from differ less within them than a merge does), so the error is that of as many random items, s² · Σ w_i² ·
  (1 − n/N), which errs on the safe side.
- ``regression``: a ridge regression of the merge's scores on the references', fitted to the anchors, predicts all items; the
  mean residual on the anchors corrects the rest (the generalised regression estimator of survey sampling, Särndal et al.
  1992, which is approximately unbiased for anchors drawn at random, whatever the model). Its variance is that of the
  mean with, in place of the scores' variance, the mean square of the residuals of each anchor in a regression on the
  others, by which the penalty is chosen as well.
- ``mp_irt`` and ``gmp_irt`` (MERGE³, arXiv:2502.10436): see `optimizer.fitness.irt`. With p_i the fitted probabilities,
  mp = (n/N)·Σ w_i y_i + (1 − n/N)·mean over the rest of p_i, and gmp is half of mp and half of ``weighted``. The error
  of mp has three parts: the rest's own randomness, Σ p(1−p)/N², that of the mixture, gᵀ C g with g the gradient of the
  mean over the rest and C the mixture's covariance, and by how much the fit misses the anchors. Where a merge is no
  mixture of its experts' abilities this is too little: many items make mp sure of what its model gets wrong. gmp's is
  the mean of both errors, as if they went together.

Standard errors from few items are enlarged so that 1.96 of them on either side make a 95 % interval (Student's t).
Item responses are for answers, right or wrong; where scores are anything else both IRT estimators are ``regression``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from optimizer.fitness.irt import ItemResponses, fit, mixture

Method = Literal["mean", "weighted", "regression", "mp_irt", "gmp_irt"]
Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_HALF = 0.5
_MOST_ABILITIES = 3
_PENALTIES = np.geomspace(1e-4, 1e4, 33)


@dataclass(frozen=True)
class Estimate:
    """A value on all items, as far as a few of them tell.

    Attributes:
        value: the estimate.
        error: its standard error.
    """

    value: float
    error: float


@dataclass(frozen=True)
class Anchors:
    """Items that stand for all.

    Attributes:
        places: shape (n,): which.
        weights: shape (n,), sum 1.
    """

    places: NDArray[np.int64]
    weights: Vector

    def to_json(self) -> dict[str, Any]:
        """Return plain data; numbers come back bit for bit."""
        return {"places": self.places.tolist(), "weights": self.weights.tolist()}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Anchors:
        """Return what `to_json` wrote."""
        return cls(np.array(data["places"], dtype=np.int64), np.array(data["weights"], dtype=np.float64))


def random_anchors(order: NDArray[np.int64], count: int) -> Anchors:
    """Return the first items of an order that is random already."""
    count = min(count, len(order))
    return Anchors(order[:count], np.full(count, 1 / count))


def clustered_anchors(references: Matrix, count: int, seed: int) -> Anchors:
    """Return the items nearest to the centres of clusters of items (k-means on the references' scores, standardised).

    Args:
        references: shape (models, items).
        count: how many.
        seed: of the first centres.
    """
    from sklearn.cluster import KMeans  # here: most jobs estimate nothing

    spread = references.std(axis=1, keepdims=True)
    x = ((references - references.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1.0)).T
    clusters = min(count, len(np.unique(x, axis=0)))
    found = KMeans(clusters, n_init=4, random_state=seed).fit(x)
    distances = ((x - found.cluster_centers_[found.labels_]) ** 2).sum(axis=1)
    # Items that are equally near are taken in an order that says nothing about them.
    random = np.random.Generator(np.random.PCG64(seed))
    nearest = np.lexsort((random.permutation(len(x)), distances))
    members = [nearest[found.labels_[nearest] == cluster] for cluster in range(clusters)]
    shares = _shared_out(min(count, len(x)), [len(each) for each in members])
    places = np.concatenate([each[:share] for each, share in zip(members, shares, strict=True)])
    weights = np.concatenate(
        [np.full(share, len(each) / share / len(x)) for each, share in zip(members, shares, strict=True)]
    )
    order = np.argsort(places)
    return Anchors(places[order], weights[order])


def _shared_out(count: int, sizes: Sequence[int]) -> list[int]:
    """How many items each cluster gives: one, and of the others the more the larger it is (Webster's method)."""
    shares = [1] * len(sizes)
    for _ in range(count - len(sizes)):
        wanting = [size / (2 * share + 1) if share < size else 0.0 for size, share in zip(sizes, shares, strict=True)]
        shares[int(np.argmax(wanting))] += 1
    return shares


def _wider(count: int) -> float:
    """By how much a standard error from few items has to grow for 1.96 of it to be a 95 % interval (Student's t)."""
    from scipy.stats import t as student

    return float(student.ppf(0.975, max(1, count - 1)) / 1.96)


def _least(scores: Vector) -> float:
    """Least variance to assume of answers that are right or wrong, so that a few that are all right prove nothing.

    It is that of two wrong ones among four more (Agresti and Coull 1998).
    """
    share = 2 / (len(scores) + 4)
    return share * (1 - share) if np.isin(scores, (0.0, 1.0)).all() else 0.0


class Estimator:
    """Estimates merges' values on one objective's items.

    Args:
        method: how.
        references: shape (models, items): scores of models that were measured on all items; maybe none.
        anchors: the items that merges are measured on.
        responses: fitted before; fitted here by default, where the method needs any.
    """

    def __init__(
        self, method: Method, references: Matrix, anchors: Anchors, responses: ItemResponses | None = None
    ) -> None:
        self._references = references
        self.anchors = anchors
        self._items = references.shape[1]
        self.method = self._possible(method)
        self._responses = responses
        if responses is None and self.method in ("mp_irt", "gmp_irt"):
            self._responses = fit(references, max(1, min(_MOST_ABILITIES, len(references) - 1)))

    def responses_json(self) -> dict[str, Any] | None:
        """Return the fitted item responses as plain data; None where the method has none."""
        return None if self._responses is None else self._responses.to_json()

    def _possible(self, method: Method) -> Method:
        """The method, or what stands in for it: answers that are not right or wrong, or no references."""
        if not len(self._references):
            return "mean" if method != "weighted" else method
        binary = np.isin(self._references, (0.0, 1.0)).all()
        return "regression" if method in ("mp_irt", "gmp_irt") and not binary else method

    def estimate(self, scores: Vector) -> Estimate:
        """Return the value on all items.

        Args:
            scores: shape (n,): those of the anchors.
        """
        if len(scores) >= self._items:
            return Estimate(float(scores.mean()), 0.0)
        if self._responses is not None and np.isin(scores, (0.0, 1.0)).all():
            return self._irt(self._responses, scores)
        if self.method in ("regression", "mp_irt", "gmp_irt"):
            return self._regression(scores)
        return self._weighted(scores)

    def _weighted(self, scores: Vector) -> Estimate:
        weights, n = self.anchors.weights, len(scores)
        value = float(weights @ scores)
        variance = float(weights @ (scores - value) ** 2) * n / max(1, n - 1) if n > 1 else value**2
        variance = max(variance, _least(scores))
        return Estimate(value, float(np.sqrt(variance * (weights @ weights) * (1 - n / self._items))) * _wider(n))

    def _regression(self, scores: Vector) -> Estimate:
        places, n = self.anchors.places, len(scores)
        x, mean = self._references.T, self._references[:, places].mean(axis=1)
        centre = scores.mean()
        left, strength, right = np.linalg.svd(x[places] - mean, full_matrices=False)
        projected = left.T @ (scores - centre)

        def left_out(penalty: float) -> Vector:
            """Each anchor's residual in a regression on the others."""
            shrink = strength**2 / (strength**2 + penalty)
            leverage = 1 / n + (left**2 @ shrink)
            return np.asarray((scores - centre - left @ (shrink * projected)) / np.maximum(1 - leverage, 1e-6))

        scale = max(float((strength**2).mean()), 1e-12)
        penalty = min(scale * _PENALTIES, key=lambda each: float((left_out(each) ** 2).sum()))
        slopes = right.T @ (strength / (strength**2 + penalty) * projected)
        predicted = centre + (x - mean) @ slopes
        value = float(predicted.mean() + (scores - predicted[places]).mean())
        variance = max(float((left_out(penalty) ** 2).mean()), _least(scores))
        return Estimate(value, float(np.sqrt(variance / n * (1 - n / self._items))) * _wider(n))

    def _irt(self, responses: ItemResponses, scores: Vector) -> Estimate:
        places, n, total = self.anchors.places, len(scores), self._items
        weights, covariance = mixture(responses, places, scores)
        p = responses.probabilities(weights)
        rest = np.setdiff1d(np.arange(total), places)
        spread = p[rest] * (1 - p[rest])
        gradient = (spread[:, None] * (responses.slopes[rest] @ responses.abilities.T)).sum(axis=0) / total
        value = n / total * float(self.anchors.weights @ scores) + (1 - n / total) * float(p[rest].mean())
        bias = (1 - n / total) * float(self.anchors.weights @ (scores - p[places]))
        error = float(np.sqrt(spread.sum() / total**2 + gradient @ covariance @ gradient + bias**2))
        if self.method == "mp_irt":
            return Estimate(value, error)
        other = self._weighted(scores)
        return Estimate(_HALF * value + (1 - _HALF) * other.value, _HALF * error + (1 - _HALF) * other.error)
