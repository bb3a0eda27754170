"""The estimates of a job: which items stand for all, decided once and kept, and what candidates come to on all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.estimators import Anchors, Estimator, Method, clustered_anchors, random_anchors
from optimizer.fitness.irt import ItemResponses
from optimizer.fitness.subset import item_order
from optimizer.ports import Lease, RunStore
from optimizer.problem import Problem, ResolvedObjective
from optimizer.search import Search
from optimizer.spec import JobSpec

_RANDOM = ("mean", "regression")
"""Methods whose anchors are drawn at random."""


class Estimating:
    """Chooses anchors when they are first needed, and makes estimates.

    The references are all candidates that the job began with (base, experts, uniform merge, the user's own), which are
    always measured on all items. What is decided and fitted is committed before any candidate is measured by it, and read
    back by whoever resumes the job.

    Args:
        search: the job's.
        store: where scores are and what is decided is kept.
        lease: on the job.
        kept: what was kept, if anything.
    """

    def __init__(self, search: Search, store: RunStore, lease: Lease, kept: Mapping[str, Any] | None) -> None:
        self._search = search
        self._spec: JobSpec = search.spec
        self._problem: Problem = search.problem
        self._store = store
        self._lease = lease
        self._kept = kept
        self._estimators: dict[str, Estimator] = {}
        self._shares: dict[str, NDArray[np.float64] | None] = {}

    def places(self) -> dict[str, NDArray[np.int64]]:
        """Return by objective which items a candidate is measured on."""
        return {name: estimator.anchors.places for name, estimator in self._ready().items()}

    def estimate(self, scores: Mapping[str, ItemScores]) -> tuple[list[float], tuple[float, ...]]:
        """Return the values of all objectives from the scores of their anchors, and their standard errors."""
        found = []
        for objective in self._problem.objectives:
            estimator, given = self._ready()[objective.name], scores[objective.name]
            shares = self._shares.get(objective.name)
            values = given.values.astype(np.float64)
            found.append(estimator.estimate(values if shares is None else values * shares[estimator.anchors.places]))
        return [each.value for each in found], tuple(each.error for each in found)

    def _ready(self) -> dict[str, Estimator]:
        if not self._estimators:
            if self._kept is None:
                self._kept = self._choose()
                self._store.set_anchors(self._lease, self._kept)
            kept = self._kept
            scores = self._scores(kept["references"])
            self._shares = {o.name: _shares(scores, o.name) for o in self._problem.objectives}
            self._estimators = {
                objective.name: self._estimator(objective, kept["objectives"][objective.name], scores)
                for objective in self._problem.objectives
            }
        return self._estimators

    def _choose(self) -> dict[str, Any]:
        """Decide and fit, for each objective."""
        references = self._search.beginnings
        scores = self._scores(references)
        return {
            "references": references,
            "objectives": {o.name: self._chosen(o, _matrix(scores, o)) for o in self._problem.objectives},
        }

    def _chosen(self, objective: ResolvedObjective, references: NDArray[np.float64]) -> dict[str, Any]:
        options = self._spec.fitness.estimation
        method: Method = "mean" if options.method == "none" or not len(references) else options.method
        order = item_order(self._spec.seed, objective.items)
        if objective.whole or options.items >= objective.items:
            anchors = random_anchors(np.arange(objective.items), objective.items)  # all, as they come
        elif method in _RANDOM:
            anchors = random_anchors(order, options.items)
        else:
            anchors = clustered_anchors(references, options.items, self._spec.seed)
        estimator = Estimator(method, references, anchors)
        return {"method": method, "anchors": anchors.to_json(), "responses": estimator.responses_json()}

    def _estimator(
        self, objective: ResolvedObjective, kept: Mapping[str, Any], scores: Sequence[Mapping[str, ItemScores]]
    ) -> Estimator:
        responses = kept["responses"]
        return Estimator(
            kept["method"],
            _matrix(scores, objective),
            Anchors.of(kept["anchors"]),
            None if responses is None else ItemResponses.of(responses),
        )

    def _scores(self, references: Sequence[int]) -> list[Mapping[str, ItemScores]]:
        return [self._store.items(self._lease, index, 1)[index] for index in references]


def _shares(scores: Sequence[Mapping[str, ItemScores]], name: str) -> NDArray[np.float64] | None:
    """What each item counts, with mean 1, shape (items,): a weighted mean is the mean of scores times these; None for 1."""
    weights = scores[0][name].weights if scores else None
    return None if weights is None else weights.astype(np.float64) / float(weights.mean(dtype=np.float64))


def _matrix(scores: Sequence[Mapping[str, ItemScores]], objective: ResolvedObjective) -> NDArray[np.float64]:
    """The references' scores of an objective's items, times what these count, shape (references, items)."""
    shares = _shares(scores, objective.name)
    rows = [found[objective.name].values.astype(np.float64) * (1.0 if shares is None else shares) for found in scores]
    return np.array(rows).reshape(len(rows), objective.items)
