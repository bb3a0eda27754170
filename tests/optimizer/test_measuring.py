"""No item is measured twice: within a job, across jobs, and from some of the items to all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from api.store.sql import SqlStore
from api.views import JobView
from optimizer.fitness.aggregate import ItemScores
from optimizer.ports import EvaluationPool, Result, Task
from optimizer.problem import Problem
from optimizer.spec import JobSpec
from tests.factories import make_problem, make_spec
from tests.optimizer.measured import ITEMS, Pool, Pools
from tests.optimizer.measured import run as run_job

CANDIDATES = 8


def run(store: SqlStore, pools: Pools, **changes: Any) -> JobView:
    return run_job(store, pools, make_spec(**({"budget": {"evaluations": CANDIDATES}} | changes)))


def outcomes(store: SqlStore, job: JobView) -> list[Any]:
    return [(c.fingerprint, c.values, c.failure) for c in store.list_candidates(job.id, limit=1000).items]


def test_a_job_that_was_run_before_measures_nothing(store: SqlStore) -> None:
    pools, again = Pools(), Pools()
    first, second = run(store, pools), run(store, again)
    assert len(pools.measured) == len(set(pools.measured)) == CANDIDATES * 2 * ITEMS
    assert again.measured == []
    assert outcomes(store, second) == outcomes(store, first)
    assert store.get_candidate(second.id, 3).items == store.get_candidate(first.id, 3).items
    assert store.get_candidate(second.id, 3).worker == "cache"


def test_unless_it_says_that_it_wants_to(store: SqlStore) -> None:
    run(store, Pools(), fitness={"cache": False})
    other, pools = Pools(), Pools()
    run(store, other)
    assert len(other.measured) == CANDIDATES * 2 * ITEMS
    run(store, pools, fitness={"cache": False})
    assert len(pools.measured) == CANDIDATES * 2 * ITEMS


def test_of_new_items_only_the_new_ones_are_measured(store: SqlStore) -> None:
    run(store, Pools())
    grown = [*[f"language {n}" for n in range(ITEMS)][::-1], "new", "language 3", "newer"]
    pools = Pools(words={"language": grown})
    job = run(store, pools)
    assert {(name, place) for _, name, place in pools.measured} == {("language", ITEMS), ("language", ITEMS + 2)}
    fresh = Pools(words={"language": grown})
    alone = run(store, fresh, fitness={"cache": False})
    assert outcomes(store, job) == outcomes(store, alone)


def test_from_some_items_to_all_each_is_measured_once(store: SqlStore) -> None:
    pools = Pools()
    algorithm = {"name": "forest", "options": {"items_min": 2}}
    spec = {"algorithm": algorithm, "budget": {"evaluations": 40}, "workers": {"count": 3}}
    job = run(store, pools, **spec)
    found = store.list_candidates(job.id, limit=1000).items
    partial = {c.fingerprint for c in found if c.partial is not None}
    assert {c.fingerprint for c in found if c.partial is None} & partial, "none went on to more items"
    assert len(pools.measured) == len(set(pools.measured))
    again = Pools()
    alone = run(store, again, **spec, fitness={"cache": False})
    assert outcomes(store, alone) == outcomes(store, job)
    assert len(again.measured) > len(set(again.measured))


def test_failures_are_not_remembered(store: SqlStore) -> None:
    run(store, Pools(fail=True))
    pools = Pools()
    run(store, pools)
    assert len(pools.measured) == CANDIDATES * 2 * ITEMS


def test_items_without_digests_are_not_remembered(store: SqlStore) -> None:
    class Unknown(Pools):
        def prepare(self, spec: JobSpec) -> Problem:
            return make_problem(spec)

    for pools in (Unknown(), Unknown()):
        run(store, pools)
        assert len(pools.measured) == CANDIDATES * 2 * ITEMS


def test_weights_of_items_are_remembered(store: SqlStore) -> None:
    class Weighted(Pool):
        def evaluate(self, task: Task) -> Result:
            found = super().evaluate(task)
            weights: NDArray[np.float32] = np.arange(1, ITEMS + 1, dtype=np.float32)
            return Result(
                found.index, {name: ItemScores(scores.values, weights) for name, scores in found.scores.items()}
            )

    class WeightedPools(Pools):
        def open(self, spec: JobSpec, problem: Problem) -> EvaluationPool:
            return Weighted(self, spec, problem)

    pools, again = WeightedPools(), WeightedPools()
    first, second = run(store, pools), run(store, again)
    assert again.measured == []
    assert outcomes(store, second) == outcomes(store, first)
