"""A search whose hopeless candidates are stopped: what it saves, what it tells, and what it must not lose."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from api.store.sql import SqlStore
from api.views import CandidateSummary, JobView
from optimizer.algorithms import ALGORITHMS
from optimizer.controller import Controller, ControllerConfig
from optimizer.problem import Problem
from optimizer.recipe import Recipe
from optimizer.spec import CandidateInput, JobSpec
from tests.factories import make_spec
from tests.optimizer.measured import Pools, run

WORDS = {name: [f"{name} {n}" for n in range(200)] for name in ("language", "polarity")}
RACING: dict[str, Any] = {"racing": {"enabled": True, "first_items": 16}}


def quality(recipe: Recipe) -> float:
    """Far from a half every coefficient costs."""
    coefficients = np.array(recipe.to_json()["root"].get("coefficients", [[0.0]]))
    return -4 * float(np.square(coefficients - 0.5).mean())


def spec_of(**changes: Any) -> JobSpec:
    fields: dict[str, Any] = {
        "algorithm": {"name": "cma_es", "options": {"population": 6}},
        "budget": {"evaluations": 40},
        "fitness": RACING,
    }
    return make_spec(**(fields | changes))


def candidates(store: SqlStore, job: JobView) -> list[CandidateSummary]:
    return store.list_candidates(job.id, limit=1000).items


@pytest.mark.parametrize("algorithm", ["cma_es", "nsga2", "nsga3", "trust_region", "bayesian"])
def test_hopeless_candidates_are_stopped_and_told_as_losers(store: SqlStore, algorithm: str) -> None:
    pools = Pools(words=WORDS, quality=quality)
    options = {"population": 6} if "population" in ALGORITHMS[algorithm].Options.model_fields else {}
    job = run(store, pools, spec_of(algorithm={"name": algorithm, "options": options}))
    found = candidates(store, job)
    stopped = [candidate for candidate in found if candidate.stopped]
    assert stopped, "nobody was stopped"
    assert len(pools.measured) == len(set(pools.measured))
    saved = sum(2 * (200 - (candidate.partial or 0)) for candidate in stopped)
    assert len(pools.measured) == 40 * 2 * 200 - saved
    whole = {c.index: c.values for c in found if c.values is not None and not c.stopped}
    for candidate in stopped:
        assert candidate.partial in (16, 32, 64, 128)
        assert candidate.values is not None
        assert candidate.errors is not None
        assert min(candidate.errors) > 0
        assert not candidate.on_front
        loss = candidate.values[1] - candidate.values[0]
        assert any(loss > values[1] - values[0] for index, values in whole.items() if index < candidate.index)
    assert all(c.errors is None for c in found if not c.stopped)


def test_estimates_are_as_good_as_they_say(store: SqlStore) -> None:
    job = run(store, Pools(words=WORDS, quality=quality), spec_of())
    exact = Pools(words=WORDS, quality=quality)
    for candidate in candidates(store, job):
        if candidate.stopped:
            store_view = store.get_candidate(job.id, candidate.index)
            recipe = Recipe.parse(store_view.recipe)
            true = truth(exact, recipe)
            assert candidate.values is not None
            assert candidate.errors is not None
            assert all(np.abs(np.array(candidate.values) - true) < 5 * np.array(candidate.errors) + 1e-6)


def truth(pools: Pools, recipe: Recipe) -> np.ndarray[Any, Any]:
    from optimizer.ports import Task
    from tests.optimizer.measured import Pool

    spec = spec_of()
    result = Pool(pools, spec, pools.prepare(spec)).evaluate(Task(0, recipe.to_json()))
    return np.array([result.scores[name].mean() for name in ("language", "polarity")])


def test_what_a_user_asks_for_is_measured_on_all_items(store: SqlStore) -> None:
    """And only on those that are not known yet."""
    pools = Pools(words=WORDS, quality=quality)
    spec = spec_of(budget={"evaluations": 60, "patience": 40})
    job, _ = store.create_job(spec)
    asked: list[int] = []

    class Enqueuing(SqlStore):
        def add_evaluation(self, lease: Any, evaluation: Any, remembered: Any = ()) -> bool:
            done = super().add_evaluation(lease, evaluation, remembered)
            if evaluation.stopped is not None and not asked:
                asked.append(evaluation.index)
                genome = self.get_candidate(lease.job_id, evaluation.index).genome
                self.enqueue(lease.job_id, CandidateInput(genome=genome, label="again"))
            return done

    other = Enqueuing(str(store.engine.url))
    assert Controller(other, pools, ControllerConfig("test", poll_s=0.0)).run_next(job.id)
    other.close()
    found = candidates(store, store.get_job(job.id))
    again = next(candidate for candidate in found if candidate.label == "again")
    assert (again.duplicate_of, again.stopped, again.partial) == (None, False, None)
    assert again.fingerprint == next(c for c in found if c.index == asked[0]).fingerprint
    assert len(pools.measured) == len(set(pools.measured))


def test_without_races_everything_is_measured(store: SqlStore) -> None:
    class Medians(Pools):
        def prepare(self, spec: JobSpec) -> Problem:
            found = super().prepare(spec)
            objectives = [found.objectives[0].model_copy(update={"whole": True}), *found.objectives[1:]]
            return found.model_copy(update={"objectives": objectives})

    for pools, spec in (
        (Pools(words=WORDS, quality=quality), spec_of(fitness={})),
        (Medians(words=WORDS, quality=quality), spec_of()),
        (Pools(words=WORDS, quality=quality), spec_of(fitness={"racing": {"enabled": True, "first_items": 200}})),
    ):
        spec = spec.model_copy(update={"fitness": spec.fitness.model_copy(update={"cache": False})})
        job = run(store, pools, spec)
        assert not any(candidate.stopped or candidate.partial for candidate in candidates(store, job))
        assert len(pools.measured) == 40 * 2 * 200


def _stop_at(controller: Controller, calls: Iterator[int], number: int) -> None:
    if next(calls) == number:
        controller.stop()


def test_interrupted_again_and_again_it_races_the_same(store: SqlStore) -> None:
    whole = run(store, Pools(words=WORDS, quality=quality), spec_of())
    alone = spec_of(fitness=RACING | {"cache": False})
    job, _ = store.create_job(alone)
    lives = 0
    while store.get_job(job.id).state in ("queued", "running"):
        pools = Pools(words=WORDS, quality=quality)
        controller = Controller(store, pools, ControllerConfig("test", poll_s=0.0))
        pools.on_task = partial(_stop_at, controller, iter(range(100)), 7)
        assert controller.run_next(job.id)
        lives += 1
    assert lives > 4
    seen = [
        [(c.fingerprint, c.values, c.errors, c.partial, c.stopped, c.on_front) for c in candidates(store, view)]
        for view in (whole, store.get_job(job.id))
    ]
    assert seen[0] == seen[1]
