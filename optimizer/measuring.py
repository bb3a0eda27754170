"""From a candidate to the items that are still to be measured, and from what came back to its outcome.

Scores are remembered by what was measured (the measure: evaluator, version, options, head, device, type), on which merge
(the recipe's fingerprint) and on which item (by its content), across candidates and jobs. What is known is not measured
again; what is measured joins what was known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from optimizer.errors import InfeasibleCandidate
from optimizer.estimating import Estimating
from optimizer.fitness.aggregate import ItemScores, aggregate, violation
from optimizer.fitness.known import Known, PlacedScores, Places, missing, pick, union
from optimizer.fitness.subset import item_order
from optimizer.ports import Candidate, Evaluation, Failure, Lease, Remembered, Result, RunStore, Task
from optimizer.problem import Problem, ResolvedObjective
from optimizer.races import Races
from optimizer.spec import JobSpec

_UNKNOWN = PlacedScores.none()


@dataclass(frozen=True)
class Plan:
    """An evaluation to come.

    Attributes:
        task: for a worker; None where everything is known.
        wanted: by objective, the items that the outcome is made of.
        known: by objective, what need not be measured.
    """

    task: Task | None
    wanted: Mapping[str, Places]
    known: Known


class Measuring:
    """Plans the evaluations of one job.

    Args:
        spec: the job.
        problem: its inputs as found.
        memory: of scores that need not be measured again.
        races: in which candidates may lose before all their items are measured.
        estimating: makes estimates of candidates that are measured on the anchors alone.
    """

    def __init__(self, spec: JobSpec, problem: Problem, memory: Memory, races: Races, estimating: Estimating) -> None:
        self._estimating = estimating
        self._spec = spec
        self._problem = problem
        self._memory = memory
        self._races = races
        self._plans: dict[int, Plan] = {}

    def plan(self, candidate: Candidate) -> Plan:
        """Return what is to be measured for a candidate's outcome."""
        objectives = self._problem.objectives
        wanted = {objective.name: self._wanted(objective, candidate) for objective in objectives}
        known = self._memory.recall(objectives, candidate.fingerprint)
        if candidate.estimated:
            wanted = self._estimating.places()
        race = self._races.terms(candidate.rivals, known)
        order = wanted if race is None else self._races.order
        partial = candidate.estimated or race is not None or bool(known)
        places = {name: missing(known.get(name, _UNKNOWN), order[name]) for name in order} if partial else None
        task: Task | None = Task(
            candidate.index, candidate.recipe, candidate.items, candidate.slopes, places, race=race
        )
        if places is not None and not candidate.slopes and not any(len(each) for each in places.values()):
            task = None
        plan = Plan(task, wanted, known)
        self._plans[candidate.index] = plan
        return plan

    def outcome(self, candidate: Candidate, result: Result) -> tuple[Evaluation, list[Remembered]]:
        """Return a candidate's outcome, and what should be remembered of it; the candidate was planned before."""
        plan = self._plans.pop(candidate.index)
        evaluation = Evaluation(
            result.index,
            None,
            failure=result.failure,
            seconds=result.seconds,
            worker=result.worker,
            cost=result.cost,
        )
        if result.failure is not None:
            return evaluation, []
        if result.stopped is not None:
            plan = replace(plan, wanted={name: order[: result.stopped] for name, order in self._races.order.items()})
        fresh = self._fresh(plan, result)
        remembered = self._memory.entries(self._problem.objectives, candidate.fingerprint, fresh)
        scores = _joined(plan, fresh, result.scores)
        try:
            values = aggregate(self._problem.objectives, scores)
        except InfeasibleCandidate as error:
            return replace(evaluation, failure=Failure(error.code, str(error))), remembered
        if candidate.estimated:
            values, errors = self._estimating.estimate(scores)
            evaluation = replace(evaluation, errors=errors)
        if result.stopped is not None and candidate.rivals is not None:
            values, errors = self._races.estimate(candidate.rivals.references[result.lost_to], scores)
            evaluation = replace(evaluation, stopped=result.stopped, errors=errors)
        evaluation = replace(
            evaluation,
            values=tuple(values),
            violation=violation(self._problem.objectives, values),
            items=scores,
            slopes=result.slopes,
        )
        return evaluation, remembered

    def _fresh(self, plan: Plan, result: Result) -> dict[str, PlacedScores]:
        """What a worker measured, with its places; nothing of an objective where it returned other items than it should."""
        out = {}
        for name, wanted in plan.wanted.items():
            order = wanted
            if plan.task is not None and plan.task.race is not None:
                order = self._races.order[name][: result.stopped]
            places = missing(plan.known[name], order) if plan.known else order
            scores = result.scores.get(name)
            fits = scores is not None and len(scores.values) == len(places)
            out[name] = PlacedScores(places, scores) if fits and scores is not None else PlacedScores.none()
        return out

    def forget(self, indices: Sequence[int]) -> None:
        """Drop the plans of candidates that are planned anew later."""
        for index in indices:
            self._plans.pop(index, None)

    def _wanted(self, objective: ResolvedObjective, candidate: Candidate) -> Places:
        if candidate.items is None or objective.whole or candidate.items >= objective.items:
            return np.arange(objective.items)
        return item_order(self._spec.seed, objective.items)[: candidate.items]


def _key(objective: ResolvedObjective) -> str:
    """What scores are remembered under: where they depend on all items together, these are part of it."""
    if not objective.whole:
        return objective.measure
    return hashlib.sha256(f"{objective.measure}:{objective.data_digest}".encode()).hexdigest()


class Memory:
    """Scores of items that are remembered across candidates and jobs; of objectives whose items have no digests, none.

    Args:
        store: where they are kept.
        lease: on the job.
        enabled: whether any are looked up and kept.
    """

    def __init__(self, store: RunStore, lease: Lease, *, enabled: bool) -> None:
        self._store = store
        self._lease = lease
        self._enabled = enabled
        self._places: dict[tuple[str, str], dict[bytes, list[int]]] = {}

    def recall(self, objectives: Sequence[ResolvedObjective], fingerprint: str) -> Known:
        """Return what is known of a merge, by objective; nothing at all where no item of any objective is known."""
        measures = {_key(objective) for objective in objectives if self._remembers(objective)}
        if not measures:
            return {}
        found = self._store.remembered(self._lease, sorted(measures), fingerprint)
        known = {
            objective.name: union([self._placed(objective, part) for part in found if part.measure == _key(objective)])
            for objective in objectives
        }
        return known if any(len(part.places) for part in known.values()) else {}

    def entries(self, objectives: Sequence[ResolvedObjective], fingerprint: str, fresh: Known) -> list[Remembered]:
        """Return what should be kept of freshly measured scores."""
        return [
            Remembered(
                _key(objective),
                fingerprint,
                objective.item_digests[fresh[objective.name].places].tobytes(),
                fresh[objective.name].scores,
            )
            for objective in objectives
            if self._remembers(objective)
            and len(fresh[objective.name].places) >= (objective.items if objective.whole else 1)
        ]

    def _remembers(self, objective: ResolvedObjective) -> bool:
        return self._enabled and bool(objective.measure) and len(objective.item_digests) == objective.items

    def _placed(self, objective: ResolvedObjective, part: Remembered) -> PlacedScores:
        """Where the items of a remembered part stand among the objective's; others are left out."""
        key = objective.name, objective.data_digest
        if key not in self._places:
            at: dict[bytes, list[int]] = {}
            for place, digest in enumerate(objective.item_digests):
                at.setdefault(digest.tobytes(), []).append(place)
            self._places[key] = at
        places = self._places[key]
        pairs = [
            (place, row)
            for row, digest in enumerate(part.split())
            for place in places.get(digest, ())  # the same item may stand several times in the data
        ]
        rows = np.array([row for _, row in pairs], dtype=np.int64)
        weights = part.scores.weights
        scores = ItemScores(part.scores.values[rows], None if weights is None else weights[rows])
        return PlacedScores(np.array([place for place, _ in pairs], dtype=np.int64), scores)


def _joined(plan: Plan, fresh: Mapping[str, PlacedScores], scores: Mapping[str, ItemScores]) -> dict[str, ItemScores]:
    """The scores of all wanted items, in their order."""
    if not plan.known and (plan.task is None or plan.task.race is None):
        return dict(scores)
    out = {}
    for name, new in fresh.items():
        found = pick(union([plan.known[name], new] if plan.known else [new]), plan.wanted[name])
        if found is not None:
            out[name] = found
    return out
