"""Workers that score each item by the merge and its content, without models, and write down what they are asked for."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from api.store.sql import SqlStore
from api.views import JobView
from optimizer.controller import Controller, ControllerConfig
from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.known import PlacedScores, pick, union
from optimizer.fitness.racing import Terms
from optimizer.fitness.subset import item_order
from optimizer.ports import EvaluationPool, Failure, Result, Task
from optimizer.problem import Problem, ResolvedObjective, TestItems
from optimizer.recipe import Recipe
from optimizer.spec import JobSpec
from tests.factories import make_problem

ITEMS = 20


def identified(
    spec: JobSpec, words: Mapping[str, list[str]] | None = None, test: Mapping[str, list[str]] | None = None
) -> Problem:
    """The problem, its items known by digests: those of ``words``, and of ``test``, by objective."""
    problem = make_problem(spec)
    objectives = []
    for found in problem.objectives:
        texts = (words or {}).get(found.name, [f"{found.name} {n}" for n in range(ITEMS)])
        update = {"measure": f"measure of {found.name}", "digests": _digests(texts), "items": len(texts)}
        if found.name in (test or {}):
            tested = (test or {})[found.name]
            update["test"] = TestItems(items=len(tested), data_digest="0" * 64, digests=_digests(tested))
        objectives.append(found.model_copy(update=update))
    return problem.model_copy(update={"objectives": objectives})


def _digests(texts: list[str]) -> str:
    digests = b"".join(hashlib.sha256(text.encode()).digest()[:16] for text in texts)
    return base64.b64encode(digests).decode()


@dataclass
class Pools:
    """A pool factory.

    Attributes:
        words: the texts of an objective's items, by objective; as many as `ITEMS` by default.
        test: the texts of its test items; it has none by default.
        measured: what was asked for: fingerprint, objective (``test/`` before it for test items), place.
        fail: whether every evaluation fails.
        flatter: how much better items of the search look than those of the test.
        quality: what is added to every score of a recipe where more is better, and taken off where less is.
        on_task: called before anything is measured.
        on_test: called before test items are measured.
    """

    words: Mapping[str, list[str]] = field(default_factory=dict)
    measured: list[tuple[str, str, int]] = field(default_factory=list)
    fail: bool = False
    test: Mapping[str, list[str]] = field(default_factory=dict)
    flatter: float = 0.0
    quality: Callable[[Recipe], float] = lambda _: 0.0
    on_task: Callable[[], object] = lambda: None
    on_test: Callable[[], object] = lambda: None

    def prepare(self, spec: JobSpec) -> Problem:
        return identified(spec, self.words, self.test)

    def open(self, spec: JobSpec, problem: Problem) -> EvaluationPool:
        return Pool(self, spec, problem)

    def close(self) -> None:
        pass


class Pool:
    def __init__(self, pools: Pools, spec: JobSpec, problem: Problem) -> None:
        self.pools, self.spec, self.problem = pools, spec, problem
        self._todo: list[Task] = []

    def submit(self, task: Task) -> None:
        self._todo.append(task)

    def wait(self, timeout_s: float) -> list[Result]:
        del timeout_s
        todo, self._todo = self._todo, []
        return [self.evaluate(task) for task in todo]

    def evaluate(self, task: Task) -> Result:
        """What a worker returns."""
        recipe = Recipe.parse(dict(task.recipe))
        fingerprint = recipe.fingerprint
        self.pools.on_task()
        if task.race is not None and task.places is not None:
            return self._race(task, task.race, fingerprint, recipe)
        scores = {}
        for objective in self.problem.objectives:
            places = np.arange(objective.items)
            if task.places is not None:
                places = task.places[objective.name]
            elif task.items is not None:
                places = item_order(self.spec.seed, objective.items)[: task.items]
            if len(places):
                scores[objective.name] = self.score(objective, fingerprint, places, self.pools.flatter, recipe=recipe)
        if task.test:
            self.pools.on_test()
        tested = {
            objective.name: self.score(objective.test_items, fingerprint, task.test[objective.name], 0.0, "test/")
            for objective in self.problem.objectives
            if len(task.test.get(objective.name, ()))
        }
        if self.pools.fail:
            return Result(task.index, failure=Failure("evaluation_failed", "no"))
        return Result(task.index, scores, test=tested)

    def _race(self, task: Task, terms: Terms, fingerprint: str, recipe: Recipe) -> Result:
        assert task.places is not None
        race = terms.race()
        found: dict[str, ItemScores] = {}
        for rung in (*terms.rungs, max(o.items for o in self.problem.objectives)):
            for objective in self.problem.objectives:
                order = item_order(self.spec.seed, objective.items)
                wanted = task.places[objective.name]
                places = wanted[np.isin(wanted, order[:rung])]
                seen = found.get(objective.name)
                new = places[0 if seen is None else len(seen.values) :]
                more = self.score(objective, fingerprint, new, self.pools.flatter, recipe=recipe)
                values = more.values if seen is None else np.concatenate([seen.values, more.values])
                found[objective.name] = ItemScores(values)
            first = [self._first(task, terms, name, found[name], rung) for name in terms.objectives]
            standing = race.standing(terms.losses(first))
            if standing.lost and rung in terms.rungs:
                return Result(task.index, found, stopped=rung, lost_to=standing.reference)
        return Result(task.index, found)

    def _first(self, task: Task, terms: Terms, name: str, found: ItemScores, rung: int) -> NDArray[np.float32]:
        """Scores of the first items of the shared order, known or measured."""
        assert task.places is not None
        measured = PlacedScores(task.places[name][: len(found.values)], found)
        items = next(o.items for o in self.problem.objectives if o.name == name)
        scores = pick(
            union([*([terms.known[name]] if name in terms.known else []), measured]),
            item_order(self.spec.seed, items)[:rung],
        )
        assert scores is not None
        return scores.values

    def score(
        self,
        objective: ResolvedObjective,
        fingerprint: str,
        places: NDArray[np.int64],
        flatter: float,
        prefix: str = "",
        recipe: Recipe | None = None,
    ) -> ItemScores:
        """Scores of some items."""
        known = objective.item_digests
        digests = [known[place].tobytes() if len(known) else bytes([place]) for place in places]
        self.pools.measured += [(fingerprint, prefix + objective.name, int(place)) for place in places]
        values = [int.from_bytes(hashlib.sha256(d + fingerprint.encode()).digest()[:2], "big") for d in digests]
        flatter += self.pools.quality(recipe) if recipe is not None else 0.0
        better = flatter if objective.direction == "maximise" else -flatter
        return ItemScores((np.array(values) / 65536 + better).astype(np.float32))

    def withdraw(self) -> list[int]:
        return []

    def close(self) -> None:
        pass


def run(store: SqlStore, pools: Pools, spec: JobSpec) -> JobView:
    """Run a job to its end with a new controller."""
    job, _ = store.create_job(spec)
    assert Controller(store, pools, ControllerConfig("test", poll_s=0.0)).run_next(job.id)
    view = store.get_job(job.id)
    assert view.state == "completed", view.reason
    return view
