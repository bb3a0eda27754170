"""No fooling ourselves: when a search is over, its best are measured on all its items and on items it has never seen.

What a search reports is the best of many noisy numbers, so it flatters (the winner's curse), the more the fewer items there
are. The test items tell by how much: they are disjoint from the search's, and nothing is chosen by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from optimizer.errors import InfeasibleCandidate
from optimizer.fitness.aggregate import ItemScores, aggregate
from optimizer.fitness.intervals import Interval, bootstrap, overfitted
from optimizer.fitness.known import Known, PlacedScores, missing, pick, union
from optimizer.measuring import Memory
from optimizer.ports import Failure, Lease, Remembered, Result, RunStore, Split, Task, Verification
from optimizer.problem import ResolvedObjective
from optimizer.search import Search

_SPLITS: dict[Split, int] = {"search": 0, "test": 1}


class Verifying:
    """The verification of one job: which candidates, what is still to be measured, and what came of it.

    Args:
        search: the job's.
        store: where candidates' scores are, and verifications go.
        lease: on the job.
        memory: of scores that need not be measured again.
        done: by index of the candidates whose verification was begun, whether it is over.
    """

    def __init__(self, search: Search, store: RunStore, lease: Lease, memory: Memory, done: Mapping[int, bool]) -> None:
        self._search = search
        self._store = store
        self._lease = lease
        self._memory = memory
        self._done = dict(done)
        self._known: dict[int, tuple[Known, Known]] = {}
        self._search_items = list(search.problem.objectives)
        self._test_items = [found.test_items for found in search.problem.objectives if found.test is not None]

    @property
    def waiting(self) -> list[int]:
        """Candidates that are yet to be verified, the best first. New ones are committed before they are named."""
        chosen = self._chosen()
        new = [index for index in chosen if index not in self._done]
        if new:
            self._store.begin_verification(self._lease, new)
            self._done |= dict.fromkeys(new, False)
        return [index for index, done in self._done.items() if not done]

    def _chosen(self) -> list[int]:
        options = self._search.spec.fitness.verification
        chosen = self._search.best[: options.candidates]
        estimated = any(self._search.candidates[index].estimated for index in chosen)
        if not chosen or not (self._test_items or estimated):
            return []
        if estimated:  # which are the best, estimates cannot tell for sure
            others = [index for index in self._search.ranked if index not in chosen]
            chosen += others[: options.candidates - len(chosen)]
        return [*chosen, *(index for index in self._search.baselines if options.baselines and index not in chosen)]

    def task(self, index: int) -> Task | None:
        """Return what a worker must measure of a candidate; None if everything is known."""
        fingerprint = self._search.candidates[index].fingerprint
        scores = self._store.items(self._lease, index, 1).get(index, {})
        own = {
            objective.name: PlacedScores(np.arange(objective.items), scores[objective.name])
            for objective in self._search_items
            if objective.name in scores and len(scores[objective.name].values) == objective.items
        }
        remembered = self._memory.recall(self._search_items, fingerprint) if len(own) < len(self._search_items) else {}
        known = {o.name: own.get(o.name) or remembered.get(o.name) or PlacedScores.none() for o in self._search_items}
        tested = self._memory.recall(self._test_items, fingerprint)
        tested = {o.name: tested.get(o.name) or PlacedScores.none() for o in self._test_items}
        self._known[index] = known, tested
        places = {o.name: missing(known[o.name], np.arange(o.items)) for o in self._search_items}
        test = {o.name: missing(tested[o.name], np.arange(o.items)) for o in self._test_items}
        if not any(len(each) for each in (*places.values(), *test.values())):
            return None
        return Task(index, self._search.recipe_of(index).to_json(), places=places, test=test)

    def record(self, result: Result) -> None:
        """Commit what came of a candidate's verification."""
        verification, fresh = self._verification(result)
        self._store.add_verification(self._lease, verification, fresh)
        self._done[result.index] = True

    def forget(self, indices: Sequence[int]) -> None:
        """Take in that tasks were withdrawn."""
        for index in indices:
            self._known.pop(index, None)

    def _verification(self, result: Result) -> tuple[Verification, list[Remembered]]:
        known, tested = self._known.pop(result.index)
        empty = Verification(
            result.index, failure=result.failure, seconds=result.seconds, worker=result.worker, cost=result.cost
        )
        if result.failure is not None:
            return empty, []
        fingerprint = self._search.candidates[result.index].fingerprint
        parts = (
            (self._search_items, known, _placed(self._search_items, known, result.scores)),
            (self._test_items, tested, _placed(self._test_items, tested, result.test)),
        )
        fresh = [each for items, _, new in parts for each in self._memory.entries(items, fingerprint, new)]
        search, test = (_whole(items, old, new) for items, old, new in parts)
        search |= _means(self._search_items, result.scores)
        test |= _means(self._test_items, result.test)
        try:
            aggregate(self._search_items, search)
            aggregate(self._test_items, test)
        except InfeasibleCandidate as error:
            return replace(empty, failure=Failure(error.code, str(error))), fresh
        intervals: dict[Split, dict[str, Interval]] = {
            "search": self._intervals(result.index, "search", search),
            "test": self._intervals(result.index, "test", test),
        }
        worse = [
            objective.name
            for objective in self._test_items
            if overfitted(intervals["search"][objective.name], intervals["test"][objective.name], objective.direction)
        ]
        return replace(
            empty, search=intervals["search"], test=intervals["test"], overfitted=tuple(worse), items=test
        ), fresh

    def _intervals(self, index: int, split: Split, scores: Mapping[str, ItemScores]) -> dict[str, Interval]:
        names = [objective.name for objective in self._search_items]
        seed = self._search.spec.seed
        return {
            name: bootstrap(found, [seed, index, names.index(name), _SPLITS[split]]) for name, found in scores.items()
        }


def _placed(
    objectives: Sequence[ResolvedObjective], known: Known, scores: Mapping[str, ItemScores]
) -> dict[str, PlacedScores]:
    out = {}
    for objective in objectives:
        places = missing(known[objective.name], np.arange(objective.items))
        fits = objective.name in scores and len(scores[objective.name].values) == len(places)
        out[objective.name] = PlacedScores(places, scores[objective.name]) if fits else PlacedScores.none()
    return out


def _means(objectives: Sequence[ResolvedObjective], scores: Mapping[str, ItemScores]) -> dict[str, ItemScores]:
    """The scores that stand for all items together, which are measured anew, for they have no places."""
    return {o.name: scores[o.name] for o in objectives if o.means_only and o.name in scores}


def _whole(
    objectives: Sequence[ResolvedObjective], known: Known, fresh: Mapping[str, PlacedScores]
) -> dict[str, ItemScores]:
    found = {o.name: pick(union([known[o.name], fresh[o.name]]), np.arange(o.items)) for o in objectives}
    return {name: scores for name, scores in found.items() if scores is not None}
