"""The races of a job: what a worker needs to stop an evaluation, and what its outcome is estimated to be."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.known import Known, Places
from optimizer.fitness.racing import Race, Rival, Rivals, Terms, rungs
from optimizer.fitness.subset import item_order
from optimizer.ports import Lease, RunStore
from optimizer.problem import Problem
from optimizer.spec import JobSpec

_KEPT = 64

Items = Mapping[str, ItemScores]


class Races:
    """Makes the races of a job, and reads what candidates that stopped come to.

    Args:
        spec: the job.
        problem: its inputs as found.
        store: where the references' scores are.
        lease: on the job.

    Attributes:
        order: by objective, its items in the shared order.
    """

    def __init__(self, spec: JobSpec, problem: Problem, store: RunStore, lease: Lease) -> None:
        self._options = spec.fitness.racing
        self._problem = problem
        self._store = store
        self._lease = lease
        self._read: dict[int, Items] = {}
        self.order: dict[str, Places] = {o.name: item_order(spec.seed, o.items) for o in problem.objectives}

    def terms(self, rivals: Rivals | None, known: Known) -> Terms | None:
        """Return the race of a candidate; None where there are no rivals, or too few items to stop early."""
        if rivals is None:
            return None
        axes = self._problem.axes
        steps = rungs(max(axis.items for axis in axes), self._options.first_items, self._options.factor)
        scores = [self._scores(index) for index in rivals.references]
        whole = all(len(found[o.name].values) == o.items for found in scores for o in axes if o.name in found)
        if not steps or not whole or any(axis.name not in found for found in scores for axis in axes):
            return None
        first = scores[0]
        return Terms(
            rungs=steps,
            objectives=tuple(axis.name for axis in axes),
            signs=tuple(1.0 if axis.direction == "minimise" else -1.0 for axis in axes),
            rivals=tuple(tuple(found[o.name].values[self.order[o.name]] for o in axes) for found in scores),
            item_weights=tuple(_ordered(first[o.name].weights, self.order[o.name]) for o in axes),
            rule=rivals.rule,
            weights=rivals.weights,
            error=self._options.error,
            known=known,
        )

    def estimate(self, reference: int, scores: Items) -> tuple[list[float], tuple[float, ...]]:
        """Return the values of a candidate that was stopped, and their standard errors.

        The items that were not measured are taken to differ from the reference's as those do that were: its value plus the
        mean difference, whose error is that of a sample without replacement (`optimizer.fitness.racing`).

        Args:
            reference: index of the candidate it lost to.
            scores: by objective, of the first items of the shared order.
        """
        rival = self._scores(reference)
        values, errors = [], []
        for objective in self._problem.objectives:
            name, whole = objective.name, rival[objective.name]
            order = self.order[name]
            race = Race(
                [Rival((whole.values[order].astype(np.float64),))],
                np.ones(1),
                [_wide(_ordered(whole.weights, order))],
                "sum",
                self._options.error,
                1,
            )
            standing = race.standing([scores[name].values.astype(np.float64)])
            values.append(whole.mean() + float(standing.ahead[0]))
            errors.append(float(standing.errors[0]))
        return values, tuple(errors)

    def _scores(self, index: int) -> Items:
        if index not in self._read:
            if len(self._read) >= _KEPT:
                del self._read[next(iter(self._read))]
            self._read[index] = self._store.items(self._lease, index, 1).get(index, {})
        return self._read[index]


def _ordered(weights: NDArray[np.float32] | None, order: Places) -> NDArray[np.float32] | None:
    return None if weights is None else weights[order]


def _wide(weights: NDArray[np.float32] | None) -> NDArray[np.float64] | None:
    return None if weights is None else weights.astype(np.float64)
