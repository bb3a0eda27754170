"""The controller's loop on a real store; only the workers are stood in for, by functions of the genome."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from api.store.sql import SqlStore
from api.views import JobView
from optimizer.controller import Controller, ControllerConfig
from optimizer.errors import JobError, Unavailable, WorkerLost
from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.cost import FREE, Cost
from optimizer.ports import EvaluationPool, Failure, Result, Task
from optimizer.problem import Problem
from optimizer.spec import CandidateInput, JobSpec
from tests.factories import make_problem, make_spec

Score = Callable[[np.ndarray[Any, Any]], dict[str, float] | Failure | str]
"""Scores by objective, or why there are none, or why the job has to pause."""


def good(x: np.ndarray[Any, Any]) -> dict[str, float]:
    return {"language": float(x.mean()), "polarity": float(((x - 0.5) ** 2).mean())}


@dataclass
class Pools:
    """A pool factory whose workers apply ``score`` to the coefficients; ``open_error`` is raised instead of opening."""

    score: Score = good
    open_error: Exception | None = None
    prepared: Callable[[JobSpec], Problem] = make_problem
    delay_s: float = 0.0
    cost: Cost = FREE
    evaluated: list[int] = field(default_factory=list)

    def prepare(self, spec: JobSpec) -> Problem:
        return self.prepared(spec)

    def open(self, spec: JobSpec, problem: Problem) -> EvaluationPool:
        if self.open_error is not None:
            raise self.open_error
        return _Pool(self)

    def close(self) -> None:
        pass


class _Pool:
    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._todo: list[Task] = []

    def submit(self, task: Task) -> None:
        self._todo.append(task)

    def wait(self, timeout_s: float) -> list[Result]:
        if not self._todo:
            time.sleep(timeout_s)
            return []
        time.sleep(self._pools.delay_s)
        task = self._todo.pop()  # the last one first: arrival order must not matter
        self._pools.evaluated.append(task.index)
        found = self._pools.score(np.array(task.recipe["root"]["coefficients"]))
        if isinstance(found, str):
            return [Result(task.index, pause=found, cost=Cost(requests=2))]
        if isinstance(found, Failure):
            return [Result(task.index, failure=found)]
        scores = {n: ItemScores(np.full(4, v, dtype=np.float32)) for n, v in found.items()}
        return [Result(task.index, scores, cost=self._pools.cost)]

    def withdraw(self) -> list[int]:
        out = [task.index for task in self._todo]
        self._todo.clear()
        return out

    def close(self) -> None:
        self._todo.clear()


def controller(store: SqlStore, pools: Pools, **config: float) -> Controller:
    return Controller(store, pools, ControllerConfig("test", **{"poll_s": 0.01, "retry_s": 0.0} | config))


def run(store: SqlStore, pools: Pools, **changes: Any) -> JobView:
    job, _ = store.create_job(make_spec(**changes))
    assert controller(store, pools).run_next()
    return store.get_job(job.id)


def test_a_job_runs_to_the_end_of_its_budget(store: SqlStore) -> None:
    job = run(store, Pools(), parallel_evaluations=3)
    assert (job.state, job.progress.completed, job.progress.failed) == ("completed", 20, 0)
    assert job.reason == "the budget of 20 evaluations is spent"
    assert not controller(store, Pools()).run_next()


def test_a_budget_that_is_just_enough_completes_the_job(store: SqlStore) -> None:
    pools = Pools(cost=Cost(requests=2))
    enough = run(store, pools, budget={"evaluations": 20, "requests": 40})
    assert (enough.state, enough.reason) == ("completed", "the budget of 20 evaluations is spent")
    short = run(store, pools, budget={"evaluations": 20, "requests": 38})
    assert (short.state, short.reason) == ("paused", "the budget of 38 requests is spent")
    assert short.progress.completed == 19


@pytest.mark.parametrize("bad", [Failure("out_of_memory", "no"), {"language": float("nan"), "polarity": 0.0}, {}])
def test_candidates_without_a_score_cost_only_themselves(store: SqlStore, bad: Any) -> None:
    calls = iter(range(100))
    job = run(store, Pools(score=lambda x: bad if next(calls) % 3 == 0 else good(x)))
    assert job.state == "completed"
    assert job.progress.failed == 7
    assert job.progress.completed == 13
    failed = next(c for c in store.list_candidates(job.id).items if c.state == "failed")
    assert failed.failure is not None
    assert failed.failure["code"] in {"out_of_memory", "infeasible"}


def test_a_violated_constraint_keeps_a_candidate_off_the_front(store: SqlStore) -> None:
    spec = make_spec().model_dump(mode="json")
    spec["objectives"][0]["constraint"] = {"at_most": 0.5}
    job = run(store, Pools(), objectives=spec["objectives"])
    front = store.front(job.id).front
    assert front
    assert all(point.values[0] <= 0.5 for point in front)
    assert any(c.violation > 0 for c in store.list_candidates(job.id).items)


def test_a_job_whose_workers_cannot_be_had_waits_and_goes_on(store: SqlStore) -> None:
    pools = Pools(open_error=WorkerLost("the cluster cannot be reached"))
    job, _ = store.create_job(make_spec())
    assert controller(store, pools).run_next()
    assert store.get_job(job.id).state == "running"
    pools.open_error = None
    assert controller(store, pools).run_next()
    assert store.get_job(job.id).state == "completed"


@pytest.mark.parametrize("error", [JobError("no worker fits"), RuntimeError("a defect: no worker fits")])
def test_a_job_that_cannot_go_on_fails_with_its_reason_and_can_be_resumed(store: SqlStore, error: Exception) -> None:
    pools = Pools(open_error=error)
    job = run(store, pools)
    assert job.state == "failed"
    assert "no worker fits" in str(job.reason)
    pools.open_error = None
    store.request(job.id, "run")
    assert controller(store, pools).run_next()
    assert store.get_job(job.id).state == "completed"


def test_a_changed_checkpoint_is_found_on_resume(store: SqlStore) -> None:
    pools = Pools(open_error=WorkerLost("later"))
    job, _ = store.create_job(make_spec())
    controller(store, pools).run_next()

    def changed(spec: JobSpec) -> Problem:
        problem = make_problem(spec)
        models = problem.models | {"polarity": problem.models["polarity"].model_copy(update={"digest": "0" * 64})}
        return problem.model_copy(update={"models": models})

    pools.prepared, pools.open_error = changed, None
    controller(store, pools).run_next()
    failed = store.get_job(job.id)
    assert failed.state == "failed"
    assert "'polarity'" in str(failed.reason)
    assert "changed" in str(failed.reason)


def in_thread(controller: Controller) -> threading.Thread:
    thread = threading.Thread(target=controller.run_next)
    thread.start()
    return thread


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_stopping_a_controller_leaves_the_job_to_the_next(store: SqlStore) -> None:
    pools = Pools(delay_s=0.02)
    job, _ = store.create_job(make_spec(budget={"evaluations": 80}))
    first = controller(store, pools)
    thread = in_thread(first)
    until(lambda: len(pools.evaluated) > 10)
    first.stop()
    thread.join(10)
    assert store.get_job(job.id).state == "running"
    done = set(pools.evaluated)
    pools.delay_s = 0.0
    assert controller(store, pools).run_next(), "claimable at once, without waiting for the lease to run out"
    assert store.get_job(job.id).progress.completed == 80
    assert len(pools.evaluated) <= 81
    assert len(set(pools.evaluated)) == 80
    assert done


def test_a_controller_that_lost_its_lease_writes_nothing_more(store: SqlStore) -> None:
    pools = Pools(delay_s=0.02)
    job, _ = store.create_job(make_spec(budget={"evaluations": 100_000}))
    thread = in_thread(controller(store, pools, lease_ttl_s=600))
    until(lambda: store.get_job(job.id).progress.completed > 3)
    with store.write() as session:  # as if this controller had been gone for ten minutes
        from api.store.models import JobRow

        row = session.get(JobRow, job.id)
        assert row is not None
        row.lease_token += 1
    thread.join(30)
    assert not thread.is_alive()
    completed = store.get_job(job.id).progress.completed
    time.sleep(0.1)
    assert store.get_job(job.id).progress.completed == completed


def test_a_pause_takes_back_what_no_worker_has_begun(store: SqlStore) -> None:
    pools = Pools(delay_s=0.05)
    job, _ = store.create_job(
        make_spec(budget={"evaluations": 150}, parallel_evaluations=64, workers={"count": 8}), idempotency_key="a"
    )
    thread = in_thread(controller(store, pools))
    until(lambda: len(pools.evaluated) > 3)
    store.request(job.id, "pause")
    thread.join(30)
    paused = store.get_job(job.id)
    assert paused.state == "paused"
    assert paused.progress.completed < 3 + 1.5 / 0.05
    assert paused.progress.proposed > paused.progress.completed
    pools.delay_s = 0.0
    store.request(job.id, "run")
    assert controller(store, pools).run_next()
    assert store.get_job(job.id).progress.completed == 150
    assert len(pools.evaluated) == 150


def test_a_cancel_counts_more_than_a_stop(store: SqlStore) -> None:
    pools = Pools(delay_s=0.05)
    job, _ = store.create_job(make_spec(budget={"evaluations": 500}))
    running = controller(store, pools)
    thread = in_thread(running)
    until(lambda: len(pools.evaluated) > 3)
    store.request(job.id, "cancel")
    running.stop()
    thread.join(30)
    controller(store, pools).run_next()
    assert store.get_job(job.id).state == "cancelled"


def test_a_store_that_is_gone_for_a_while_costs_nothing(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = store.create_job(make_spec())
    whole, calls = store.add_evaluation, iter(range(100))

    def flaky(*args: Any) -> bool:
        if next(calls) == 5:
            raise Unavailable("the database cannot be reached")
        return whole(*args)

    monkeypatch.setattr(store, "add_evaluation", flaky)
    pools = Pools()
    assert controller(store, pools).run_next()
    assert store.get_job(job.id).state == "running"
    assert controller(store, pools).run_next()
    done = store.get_job(job.id)
    assert (done.state, done.progress.completed) == ("completed", 20)


def test_wall_time_ends_a_job(store: SqlStore) -> None:
    job = run(store, Pools(delay_s=0.02), budget={"evaluations": 100_000, "wall_time_s": 0.3})
    assert job.state == "completed"
    assert job.reason == "0.3 s of running time are over"
    assert job.progress.completed < 100_000


def test_an_evaluation_that_cannot_go_on_pauses_the_job_and_begins_anew(store: SqlStore) -> None:
    """What it cost counts; the others that were in flight are finished first."""
    asked: list[int] = []

    def score(x: np.ndarray[Any, Any]) -> dict[str, float] | str:
        asked.append(len(asked))
        return "the service is down" if len(asked) == 5 else good(x)

    pools = Pools(score)
    job = run(store, pools, parallel_evaluations=3, workers={"count": 3})
    assert (job.state, job.reason) == ("paused", "the service is down")
    assert job.progress.failed == 0
    assert job.progress.completed == len(asked) - 1
    assert job.progress.cost == {"requests": 2}
    assert not controller(store, pools).run_next(), "nobody takes it up before its user says so"
    store.request(job.id, "run")
    assert controller(store, pools).run_next()
    done = store.get_job(job.id)
    assert (done.state, done.progress.completed, done.progress.failed) == ("completed", 20, 0)
    assert len(asked) == 21
    assert sorted(set(pools.evaluated)) == list(range(20))


def test_a_pause_comes_before_the_end_of_the_time(store: SqlStore) -> None:
    """What is still to be verified could not be: asking again and again would help nobody."""

    def score(x: np.ndarray[Any, Any]) -> str:
        time.sleep(2.2)  # the time ends meanwhile
        return "the service is down"

    run(store, Pools())  # the first job of a process takes seconds to begin
    budget = {"evaluations": 20, "wall_time_s": 2.0}
    job = run(store, Pools(score), budget=budget)
    assert (job.state, job.reason) == ("paused", "the service is down")
    store.request(job.id, "run")
    assert controller(store, Pools()).run_next()
    assert store.get_job(job.id).reason == "2 s of running time are over"


def test_candidates_enqueued_before_the_job_ran_are_taken_up_or_rejected(store: SqlStore) -> None:
    job, _ = store.create_job(make_spec())
    store.enqueue(job.id, CandidateInput(coefficients={"language": 0.5}, label="mine"))
    store.enqueue(job.id, CandidateInput(coefficients={"nobody": 0.5}))
    controller(store, Pools()).run_next()
    mine = [c for c in store.list_candidates(job.id).items if c.label == "mine"]
    assert [c.state for c in mine] == ["completed"]
    rejected = [event for event in store.events(job.id, 0) if event.type == "candidate.rejected"]
    assert len(rejected) == 1
    assert "nobody" in rejected[0].data["message"]
