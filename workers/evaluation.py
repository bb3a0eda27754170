"""One evaluation of a candidate: on all items or some, item by item until it has lost a race, on test items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.cost import FREE, Cost
from optimizer.fitness.known import PlacedScores, Places, pick, union
from optimizer.fitness.racing import Terms
from optimizer.ports import Result, Task
from optimizer.problem import Problem
from optimizer.spec import JobSpec
from workers.checkpoints import Checkpoint
from workers.evaluators.base import Evaluator
from workers.measuring import E, Measure, Score, check_data, measures_of, take
from workers.prepare import make_test_evaluators
from workers.roots import Roots
from workers.services.sharing import Services


@dataclass(frozen=True)
class Found:
    """What an evaluation found; see `optimizer.ports.Result`."""

    scores: Mapping[str, ItemScores]
    cost: Cost
    test: Mapping[str, ItemScores] = field(default_factory=dict)
    stopped: int | None = None
    lost_to: int = 0


def measure(
    task: Task, searched: Sequence[Measure[E]], tested: Callable[[], Sequence[Measure[E]]], score: Score[E]
) -> Found:
    """Do what a task asks.

    Args:
        task: the candidate's.
        searched: measures over the search's items.
        tested: makes those over the test items.
        score: scores the candidate by several measures.
    """
    if task.race is not None and task.places is not None:
        return _race(task.race, task.places, searched, score)
    scores, cost = take(searched, task.items, score, task.places)
    if not task.test:
        return Found(scores, cost)
    test, more = take(tested(), None, score, task.test)
    return Found(scores, cost + more, test)


def result_of(
    task: Task,
    found: Found,
    worker: str,
    seconds: Mapping[str, float],
    slopes: NDArray[np.float64] | None = None,
) -> Result:
    """Return what a worker hands back."""
    return Result(
        task.index,
        found.scores,
        seconds=seconds,
        worker=worker,
        slopes=slopes,
        cost=found.cost,
        test=found.test,
        stopped=found.stopped,
        lost_to=found.lost_to,
    )


class Later(Generic[E]):
    """Measures that are made when they are first asked for: only the end of a search needs test items."""

    def __init__(self, make: Callable[[], Sequence[Measure[E]]]) -> None:
        self._make = make
        self._made: Sequence[Measure[E]] | None = None

    def __call__(self) -> Sequence[Measure[E]]:
        """Return them."""
        if self._made is None:
            self._made = self._make()
        return self._made


def unseen_measures(
    spec: JobSpec,
    problem: Problem,
    roots: Roots,
    checkpoints: Mapping[str, Checkpoint],
    services: Services | None = None,
) -> list[Measure[Evaluator]]:
    """Make the measures over test items; raises `InputsChanged` where these are not those that the job began with."""
    evaluators = make_test_evaluators(spec, roots, checkpoints, services)
    check_data([problem.objectives[number].test_items for number in evaluators], evaluators.values())
    return measures_of(spec, problem, evaluators, "test")


def _race(terms: Terms, places: Mapping[str, Places], measures: Sequence[Measure[E]], score: Score[E]) -> Found:
    """Measure on more and more items, until the candidate has lost or all are measured."""
    race = terms.race()
    orders = {name: measure.order for measure in measures for name, _ in measure.objectives}
    parts: dict[str, list[PlacedScores]] = {name: [] for name in orders}
    cost, seen = FREE, 0
    for rung in (*terms.rungs, None):
        # What is not known yet stands in the shared order, so that it is a stretch of it.
        stretch = {name: places[name][np.isin(places[name], order[seen:rung])] for name, order in orders.items()}
        scores, more = take(measures, None, score, stretch)
        cost += more
        for name, found in scores.items():
            parts[name].append(PlacedScores(stretch[name], found))
        if rung is None:
            break
        seen = rung
        standing = race.standing(
            terms.losses([_first(terms, parts, name, orders[name][:rung]) for name in terms.objectives])
        )
        if standing.lost:
            return Found(_fresh(parts), cost, stopped=rung, lost_to=standing.reference)
    return Found(_fresh(parts), cost)


def _first(terms: Terms, parts: Mapping[str, list[PlacedScores]], name: str, wanted: Places) -> NDArray[np.float32]:
    known = [terms.known[name]] if name in terms.known else []
    found = pick(union([*known, *parts[name]]), wanted)
    assert found is not None  # noqa: S101  known and measured items are all there are up to the rung
    return found.values


def _fresh(parts: Mapping[str, list[PlacedScores]]) -> dict[str, ItemScores]:
    """What was measured, in the order of its measuring."""
    return {name: union(each).scores for name, each in parts.items() if each}
